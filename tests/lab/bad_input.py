"""Bad input gets one clear error and changes nothing: unknown VM, no peer, used and wrong tokens, a bad configuration, a stranger at the ports."""


def promise(t):
    cluster, guest = t.protected()
    h1, h2 = cluster.h1, cluster.h2
    before = h1.vmtwin('status', 'db', '--json').stdout

    def refused(host, codes, words, *command):
        done = host.vmtwin(*command, check=False)
        check(done.returncode in codes, f'{command}: exit {done.returncode}, {done.stderr}')
        text = done.stderr.strip()
        check(len(text.splitlines()) <= 6 and any(w in text for w in words), f'{command}: unclear: {text}')

    refused(h1, (1, 2, 3), ['nosuch'], 'protect', 'nosuch', '--peer', 'h2')
    refused(h1, (1, 2, 3), ['h9'], 'protect', 'db', '--peer', 'h9')
    refused(h1, (1, 3), ['already', 'protected'], 'protect', 'db', '--peer', 'h2')
    refused(h1, (1, 2, 3), ['nosuch'], 'start', 'nosuch')
    refused(h1, (1, 2, 3), ['nosuch'], 'status', 'nosuch')
    refused(h1, (2,), ['frobnicate'], 'frobnicate')
    refused(h2, (3,), ['h1', 'holder', 'record'], 'prim', 'db')
    # A configuration with an unknown element: file, line and element are named, nothing is applied.
    text = open(h1.path('/etc/vmtwin/cluster.xml')).read().replace('</cluster>', '<surprise/></cluster>')
    with open(h1.path('/srv/') + 'bad.xml', 'w') as f:
        f.write(text)
    refused(h1, (1, 2, 3), ['surprise'], 'apply', '/srv/bad.xml')
    # Tokens: a wrong one, and one used twice.
    token = cluster.token()
    wrong = token[:-4] + ('AAAA' if token[-4:] != 'AAAA' else 'BBBB')
    refused(cluster.w1, (1, 2, 3, 6), ['token'], 'cluster', 'join', wrong, '--witness', 'w1', '--state', '/var/lib/vmtwin-witness-x')
    refused(cluster.w1, (1, 2, 3, 6), ['token'], 'cluster', 'join', 'rubbish', '--witness', 'w1', '--state', '/var/lib/vmtwin-witness-x')
    cluster.w1.vmtwin('cluster', 'join', token, '--witness', 'w1', '--state', '/var/lib/vmtwin-witness-y')
    refused(cluster.w1, (1, 2, 3, 6), ['token'], 'cluster', 'join', token, '--witness', 'w1', '--state', '/var/lib/vmtwin-witness-z')
    # Strangers at every port, with nothing, with noise, with a lot.
    stranger = f'''python3 - <<'X'
import os, socket
for port in (7720, 7721, 7722):
    for noise in (b'', b'GET / HTTP/1.0\\r\\n\\r\\n', os.urandom(512), b'\\xff' * 300000):
        for address in ('{h1.address}', '{h1.replication}', '{cluster.w1.address}'):
            try:
                s = socket.create_connection((address, port), 2)
                s.sendall(noise)
                s.close()
            except OSError:
                pass
X'''
    h2.sh(stranger)
    t.goes_on(h1)
    cluster.wait_green(h1)
    import json
    old, new = [{m['node']: (m['state'], m['generation']) for m in json.loads(x)['modules']} for x in (before, h1.vmtwin('status', 'db', '--json').stdout)]
    check(old == new, f'something changed: {old} -> {new}')
    t.only_on(h1)
    t.no_guest_errors()

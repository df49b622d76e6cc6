"""Nobody starts a protected VM where it may not run: virsh start is refused on the second and while stopped, in a sentence; files there are read-only."""


def promise(t):
    cluster, guest = t.protected()
    h1, h2 = cluster.h1, cluster.h2
    # The replicated definition is there for everybody to see and to define.
    h2.virsh('define', '/var/lib/libvirt/images/db/.vmtwin/domain.xml')
    refused = h2.virsh('start', 'db', check=False)
    check(refused.returncode != 0, 'virsh start went through on the second node')
    check('vmtwin' in refused.stderr, f'the refusal does not say what to do: {refused.stderr}')
    spoil = h2.sh('echo spoiled >> /var/lib/libvirt/images/db/db-b.raw', check=False)
    check(spoil.returncode != 0 and 'Read-only' in spoil.stderr, f'a replica could be written by hand: {spoil.stderr}')
    check(h2.sh('rm /var/lib/libvirt/images/db/db-b.raw', check=False).returncode != 0, 'a file of the replica could be removed by hand')
    t.goes_on(h1)
    t.only_on(h1)
    h1.vmtwin('stop', 'db')
    for host in (h1, h2):
        cluster.wait_state(host, 'STOP')
        refused = host.virsh('start', 'db', check=False)
        check(refused.returncode != 0, f'virsh start went through on {host.name} in STOP')
        check('vmtwin start' in refused.stderr, f'the refusal does not say what to do: {refused.stderr}')
    check(cluster.running_on() == [], 'the VM runs in STOP')
    cluster.assert_equal()
    # Another VM of the host is none of our business.
    check(h1.virsh('list', '--all').returncode == 0, 'libvirt does not answer')

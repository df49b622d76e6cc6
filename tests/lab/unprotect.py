"""A VM can be given back: plain files where they came from, startable by virsh, the peer's copy kept aside; and protected again."""


def promise(t):
    cluster, guest = t.protected()
    h1, h2 = cluster.h1, cluster.h2
    refused = h1.vmtwin('unprotect', 'db', check=False)
    check(refused.returncode == 3, f'a running module was unprotected: {refused.returncode} {refused.stderr}')
    h1.vmtwin('stop', 'db')
    cluster.wait_state(h1, 'STOP')
    t.remember_reported(h1)
    h1.vmtwin('unprotect', 'db', '--restore-layout')
    listing = h1.sh('ls -A /var/lib/libvirt/images').stdout.split()
    check('db-a.qcow2' in listing and 'db-b.raw' in listing, f'the disks are not back where they were: {listing}')
    check('db' not in listing, f'the directory is left behind: {listing}')
    check('db' not in h2.virsh('list', '--all', '--name').stdout.split(), 'the peer still has the VM defined')
    kept = [n for n in h2.sh('ls -A /var/lib/libvirt/images').stdout.split() if n.startswith('db') and 'unprotected' in n]
    check(len(kept) == 1, f"the peer's copy was not kept aside: {h2.sh('ls -A /var/lib/libvirt/images').stdout}")
    since = guest.mark(h1)
    h1.virsh('start', 'db')
    t.nothing_lost(h1, since)
    h1.virsh('destroy', 'db')
    t.remember_reported(h1)
    cluster.protect(guest)
    cluster.wait_green(h1)
    t.goes_on(h1)
    t.equal(h1)
    t.no_guest_errors()

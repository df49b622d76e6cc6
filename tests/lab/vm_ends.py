"""Why a VM ended is told apart: powered off from inside or by an admin, the module stops on both nodes; a crash restarts it in place."""


def promise(t):
    cluster, guest = t.protected()
    h1, h2 = cluster.h1, cluster.h2
    # Its process dies: a restart in place, no failover.
    since = guest.mark(h1)
    [qemu] = h1.pids('qemu-system-x86_64', 'guest=db,debug-threads=on')
    h1.signal(qemu, 'SIGKILL')
    t.remember_reported(h1)
    t.nothing_lost(h1, since)
    cluster.wait_green(h1)
    t.only_on(h1)
    # A reboot from inside is nothing to us.
    since = guest.mark(h1)
    guest.command(h1, 'reboot')
    guest.wait_boot(h1, since)
    check(cluster.state(h1)['state'] == 'PRIM', 'a reboot of the guest changed the state')
    # Powered off from inside: both stop, and stay so.
    guest.command(h1, 'poweroff')
    cluster.wait_state(h1, 'STOP')
    cluster.wait_state(h2, 'STOP')
    check(cluster.running_on() == [], 'the VM was started again although its guest powered it off')
    cluster.assert_equal()
    since = guest.mark(h1)
    h1.vmtwin('start', 'db')
    cluster.wait_green(h1)
    guest.wait_boot(h1, since)
    t.goes_on(h1)
    # An admin's virsh destroy on the holder: the same.
    h1.virsh('destroy', 'db')
    t.remember_reported(h1, h2)
    cluster.wait_state(h1, 'STOP')
    cluster.wait_state(h2, 'STOP')
    check(cluster.running_on() == [], 'the VM was started again although its admin destroyed it')
    log = h1.vmtwin('log', 'db').stdout
    check('destroy' in log.lower(), f'the log does not tell why the module stopped:\n{log[-2000:]}')
    since = guest.mark(h1)
    h1.vmtwin('start', 'db')
    t.nothing_lost(h1, since)
    t.no_guest_errors()

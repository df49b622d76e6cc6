"""A dead host comes back: only what changed is sent, the replicas become equal under writes, and a swap takes the VM home."""


def promise(t):
    cluster, guest = t.protected()
    cluster.h1.kill()
    cluster.wait_state(cluster.h2, 'ALONE')
    guest.wait_boot(cluster.h2)
    guest.command(cluster.h2, 'bulk 4', 'bulk')
    cluster.reboot(cluster.h1)
    cluster.wait_green(cluster.h2)
    t.goes_on(cluster.h2)
    t.equal(cluster.h2)
    guest.command(cluster.h2, 'loud', 'loud')
    t.goes_on(cluster.h2)
    since = guest.mark(cluster.h1)
    cluster.h2.vmtwin('swap', 'db')
    t.remember_reported(cluster.h1, cluster.h2)
    cluster.wait_green(cluster.h1)
    t.nothing_lost(cluster.h1, since)
    t.only_on(cluster.h1)
    # And the other way round once more: what came home must be as good as what left.
    since = guest.mark(cluster.h2)
    t.goes_on(cluster.h1)
    cluster.h1.kill()
    t.remember_reported(cluster.h1, cluster.h2)
    cluster.wait_state(cluster.h2, 'ALONE')
    t.nothing_lost(cluster.h2, since)
    t.no_guest_errors()

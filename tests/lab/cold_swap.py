"""A swap moves the VM: a graceful stop, a hand-over with both replicas in sync, a start on the other node; also back, also in the clear."""


def promise(t):
    cluster, guest = t.protected(clear_link=True)
    check(cluster.state(cluster.h1)['linkProtection'] == 'clear', 'status does not say that the link is in the clear')
    for source, target in ((cluster.h1, cluster.h2), (cluster.h2, cluster.h1)):
        since = guest.mark(target)
        source.vmtwin('swap', 'db')
        t.remember_reported(cluster.h1, cluster.h2)
        cluster.wait_green(target)
        t.nothing_lost(target, since)
        t.goes_on(target)
        t.only_on(target)
    t.equal(cluster.h1)
    t.no_guest_errors()

"""A one-way cut of the replication link is a cut: the holder goes on alone, and the node returns when it is mended."""


def promise(t):
    cluster, guest = t.protected()
    h1, h2 = cluster.h1, cluster.h2
    since = guest.mark(h1)
    h2.drop_incoming('r', True)
    cluster.wait_state(h1, 'ALONE')
    t.goes_on(h1)
    t.only_on(h1)
    h2.drop_incoming('r', False)
    cluster.wait_green(h1)
    t.goes_on(h1)
    check(not guest.lines(h1, 'HAVE', since), 'the guest was restarted')
    t.equal(h1)
    t.no_guest_errors()

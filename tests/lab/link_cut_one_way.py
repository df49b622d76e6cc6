"""The second hears nothing from the holder, the holder hears the second: a one-way cut is a cut. The VM goes on, alone; mended, the node returns."""


def promise(t):
    cluster, guest = t.protected()
    h1, h2 = cluster.h1, cluster.h2
    since = guest.mark(h1)
    h2.deaf_to(h1, True)
    cluster.wait_state(h1, 'ALONE')
    t.goes_on(h1)
    t.only_on(h1)
    h2.deaf_to(h1, False)
    cluster.wait_green(h1)
    t.goes_on(h1)
    check(not guest.lines(h1, 'HAVE', since), 'the guest was restarted')
    t.equal(h1)
    t.no_guest_errors()

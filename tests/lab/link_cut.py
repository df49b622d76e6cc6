"""The replication cable is cut: data moves to the other network. All ways between the nodes are cut while the witness is reached: the VM goes on where it is,
alone, without a restart; mended, the node returns."""


def promise(t):
    cluster, guest = t.protected()
    h1, h2 = cluster.h1, cluster.h2
    since = guest.mark(h1)
    h2.link('r', False)
    t.goes_on(h1)
    cluster.wait_green(h1)
    t.goes_on(h1)
    h2.link('r', True)
    for one, other in ((h1, h2), (h2, h1)):
        one.deaf_to(other, True)
    cluster.wait_state(h1, 'ALONE')
    t.goes_on(h1)
    check(cluster.state(h2)['state'] in ('SECOND', 'WAIT'), f"h2 is {cluster.state(h2)['state']}")
    t.only_on(h1)
    guest.command(h1, 'bulk 2', 'bulk')
    for host in (h1, h2):
        host.deaf_to(None, False)
    cluster.wait_green(h1)
    t.goes_on(h1)
    check(not guest.lines(h1, 'HAVE', since), 'the guest was restarted')
    t.equal(h1)
    t.no_guest_errors()

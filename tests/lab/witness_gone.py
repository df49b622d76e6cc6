"""The witness is gone: nothing happens to the VM, also a swap works; status says so; it comes back by itself."""


def promise(t):
    cluster, guest = t.protected()
    h1, h2, w1 = cluster.h1, cluster.h2, cluster.w1
    since = guest.mark(h1)
    w1.kill()
    t.goes_on(h1)
    check(cluster.state(h1)['state'] == 'PRIM', 'losing the witness changed the state')
    check(not guest.lines(h1, 'HAVE', since), 'the guest was restarted')
    since = guest.mark(h2)
    h1.vmtwin('swap', 'db')
    t.remember_reported(h1, h2)
    t.nothing_lost(h2, since)
    t.goes_on(h2)
    cluster.reboot(w1)
    cluster.wait_green(h2)
    # With the witness back, the loss of a host is survived again.
    since = guest.mark(h1)
    h2.kill()
    t.remember_reported(h1, h2)
    cluster.wait_state(h1, 'ALONE')
    t.nothing_lost(h1, since)
    t.no_guest_errors()

"""Power goes, and with it every write that was not flushed, on one host and then on both at once: all that was reported is there, the replicas become equal."""


def promise(t):
    cluster, guest = t.protected(forgetful=True)
    h1, h2 = cluster.h1, cluster.h2
    guest.wait_records(h1, 20)
    # The holder's power goes; the second has all.
    since = guest.mark(h2)
    h1.kill()
    t.remember_reported(h1)
    cluster.wait_state(h2, 'ALONE')
    t.nothing_lost(h2, since)
    t.goes_on(h2)
    cluster.reboot(h1)
    cluster.wait_green(h2)
    t.goes_on(h2)
    # Both at once: what was flushed is on both.
    marks = {h: guest.mark(h) for h in (h1, h2)}
    h1.kill()
    h2.kill()
    t.remember_reported(h1, h2)
    cluster.reboot(h1)
    cluster.reboot(h2)
    holder = t.holder()
    t.nothing_lost(holder, marks[holder])
    t.goes_on(holder)
    cluster.wait_green(holder)
    t.only_on(holder)
    # The second's power blinks while the guest is busy: it comes back without what it had not flushed, and must not be taken for equal.
    second = cluster.other(holder)
    t.goes_on(holder)
    second.kill()
    cluster.reboot(second)
    cluster.wait_green(holder)
    t.equal(holder)
    t.no_guest_errors()

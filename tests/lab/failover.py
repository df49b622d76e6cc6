"""A host dies without warning: its VM runs again on the other one, with every record that the guest had reported."""


def promise(t):
    cluster, guest = t.protected()
    guest.wait_records(cluster.h1, 20)
    since = guest.mark(cluster.h2)
    cluster.h1.kill()
    t.remember_reported(cluster.h1)
    cluster.wait_state(cluster.h2, 'ALONE')
    t.nothing_lost(cluster.h2, since)
    t.goes_on(cluster.h2)
    t.only_on(cluster.h2)
    t.no_guest_errors()
    times = cluster.state(cluster.h2)['lastTakeover']
    check(times and times['detectedMs'] <= times['wonMs'] <= times['startCalledMs'] <= times['startedMs'], f'the takeover is not told: {times}')

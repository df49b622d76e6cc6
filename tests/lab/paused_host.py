"""A host stands still for longer than its lease and wakes up: the other one has the VM by then, the old VM is ended, nothing it did counts."""


def promise(t):
    cluster, guest = t.protected()
    h1, h2 = cluster.h1, cluster.h2
    since = guest.mark(h2)
    h1.freeze(True)
    t.remember_reported(h1)
    cluster.wait_state(h2, 'ALONE')
    t.nothing_lost(h2, since)
    t.goes_on(h2)
    h1.freeze(False)
    cluster.wait_green(h2)
    check(t.holder() is h2, 'the old VM goes on')
    t.goes_on(h2)
    t.equal(h2)
    errors = guest.failures(h2)
    check(not errors, f'the guest saw I/O errors: {errors[:5]}')

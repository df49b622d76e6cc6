"""A host stands still for longer than its lease and wakes up: the other one has the VM by then, the old VM is ended, nothing it did counts."""
import time


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
    for _ in range(600):
        if cluster.running_on() == ['h2']:
            break
        time.sleep(0.1)
    t.only_on(h2)
    t.goes_on(h2)
    t.equal(h2)
    errors = guest.failures(h2)
    check(not errors, f'the guest saw I/O errors: {errors[:5]}')

"""kill -9 of the holder's module process: the VM is started afresh on an in-sync disk, nothing is lost; the second's is just started again."""


def promise(t):
    cluster, guest = t.protected()
    h1, h2 = cluster.h1, cluster.h2
    [module] = h2.pids('vmtwin', 'module', 'db')
    h2.signal(module, 'SIGKILL')
    t.goes_on(h1)
    cluster.wait_green(h1)
    since = {h: guest.mark(h) for h in (h1, h2)}
    [module] = h1.pids('vmtwin', 'module', 'db')
    h1.signal(module, 'SIGKILL')
    t.remember_reported(h1)
    holder = t.holder()
    t.nothing_lost(holder, since[holder])
    t.goes_on(holder)
    cluster.wait_green(holder)
    t.only_on(holder)
    t.equal(holder)
    t.no_guest_errors()


"""Both hosts lose power at once and come back, in either order: the VM starts once, with all that was reported; both become equal again."""


def promise(t):
    cluster, guest = t.protected()
    h1, h2 = cluster.h1, cluster.h2
    for first, second in ((h2, h1), (h1, h2)):
        reporters = (h1, h2)
        since = {h: guest.mark(h) for h in reporters}
        h1.kill()
        h2.kill()
        t.remember_reported(*reporters)
        cluster.reboot(first)
        cluster.reboot(second)
        holder = t.holder()
        t.nothing_lost(holder, since[holder])
        cluster.wait_green(holder)
        t.only_on(holder)
        t.goes_on(holder)
    t.equal(holder)
    t.no_guest_errors()


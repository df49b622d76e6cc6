"""SIGSTOP of the holder's module process: the other node has the VM, the guardian ends the old VM and that process, which returns as the second."""
from hosts import wait_for


def promise(t):
    cluster, guest = t.protected()
    h1, h2 = cluster.h1, cluster.h2
    since = guest.mark(h2)
    [module] = h1.pids('vmtwin', 'module', 'db')
    [qemu] = h1.pids('qemu-system-x86_64', 'guest=db,debug-threads=on')
    h1.signal(module, 'SIGSTOP')
    t.remember_reported(h1)
    wait_for("the old VM's end", lambda: qemu not in h1.pids('qemu-system-x86_64'), 60)
    cluster.wait_state(h2, 'ALONE', 'PRIM')
    t.nothing_lost(h2, since)
    t.goes_on(h2)
    t.only_on(h2)
    # Nobody continued it: it was ended with its VM, and the daemon has started another.
    cluster.wait_green(h2)
    check(module not in h1.pids('vmtwin', 'module', 'db'), 'the stopped process is still there')
    lines = [line for line in open(h1.path('/var/log/vmtwin/db.jsonl')) if '"guardian"' in line]
    check(len(lines) == 1 and f'process {qemu}' in lines[0], f'the guardian left no line about process {qemu}: {lines}')
    t.equal(h2)
    t.no_guest_errors()

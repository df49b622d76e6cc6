"""The demo: see tools/demo. Every figure that it prints was measured in this run."""
import argparse, atexit, json, os, signal, sys, threading, time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from hosts import Lab, LabError, wait_for  # noqa: E402
from guest import Guest, accelerator, missing_records  # noqa: E402
from product import Cluster  # noqa: E402

BOLD, PLAIN = ('\033[1m', '\033[0m') if sys.stdout.isatty() else ('', '')


def say(text=''):
    print(text, flush=True)


def head(text):
    say(f'\n{BOLD}{text}{PLAIN}')


def size(count):
    for unit in ('B', 'KiB', 'MiB', 'GiB'):
        if count < 1024 or unit == 'GiB':
            return f'{count:.0f} {unit}' if unit == 'B' else f'{count:.1f} {unit}'
        count /= 1024


class Arrivals:
    """Notes when each record was first seen on a host's console: the guest has no clock that we could trust."""

    def __init__(self, guest, host):
        self.guest, self.host, self.since = guest, host, guest.mark(host)
        self.first = None
        self.stop = False
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self):
        while not self.stop and self.first is None:
            if self.guest.lines(self.host, 'REC', self.since):
                self.first = time.time() * 1000
            time.sleep(0.005)

    def wait(self):
        wait_for("the guest's first new record", lambda: self.first, 180, 0.01)
        return self.first


def progress(cluster, ask, target):
    """Shows the resync until the two are green; the most bytes that it told of."""
    most = {'bytesSent': 0, 'bytesTotal': 0}
    tty = sys.stdout.isatty()
    began, last = time.monotonic(), 0.0
    while time.monotonic() - began < 300:
        status = cluster.state(ask)
        resync = status.get('resync')
        if resync:
            for key in most:
                most[key] = max(most[key], resync[key])
            done = resync['bytesDone'] / max(1, resync['bytesTotal'])
            left = resync['secondsLeft']
            line = (f"  [{'#' * int(done * 30):30}] {done * 100:3.0f}%  {size(resync['bytesDone'])} of {size(resync['bytesTotal'])} looked at, "
                    f"{size(resync['bytesSent'])} sent, {size(resync['rate'])}/s, {'?' if left is None else left} s left")
            if tty:
                print('\r' + line + '   ', end='', flush=True)
            elif time.monotonic() - last > 1:
                last = time.monotonic()
                say(line)
        if status['state'] == 'PRIM' and status['health'] == 'green' and cluster.state(target)['health'] == 'green':
            if tty:
                print()
            return most
        time.sleep(0.1)
    raise LabError('the resync did not end within five minutes')


def show(cluster):
    for line in next(h for h in cluster.nodes if h.up).vmtwin('status', 'db').stdout.rstrip().split('\n'):
        say('    ' + line)


def story(lab, cache):
    figures = {'accelerator': 'kvm' if accelerator() == 'kvm' else 'tcg'}
    head('1. Two hypervisor hosts, a witness, a VM')
    cluster = Cluster(lab)
    h1, h2 = cluster.h1, cluster.h2
    say(f'  h1 {h1.address}, h2 {h2.address}, witness w1 {cluster.w1.address}; each node with a libvirtd of its own; guests run under '
        f"{'KVM' if figures['accelerator'] == 'kvm' else 'TCG (emulation: slow CPUs, same I/O path)'}")
    cluster.form()
    say('  vmtwin cluster init / cluster join: certificates made, three votes')
    guest = Guest(lab)
    guest.install(h1, cache)
    say("  VM 'db' on h1: Debian's cloud kernel, one ext4 disk in qcow2, one in raw, as virt-install would leave it")

    head('2. vmtwin protect db --peer h2')
    began = time.monotonic()
    cluster.protect(guest)
    progress(cluster, h1, h2)
    guest.wait_boot(h1)
    figures['protect_to_green_ms'] = round((time.monotonic() - began) * 1000)
    say(f"  protected and in sync on both nodes after {figures['protect_to_green_ms'] / 1000:.1f} s; the VM runs on h1")
    show(cluster)
    guest.wait_records(h1, 60)

    head('3. Host h1 dies: all of its processes at once, its links cut')
    arrivals = Arrivals(guest, h2)
    since = guest.mark(h2)
    killed = time.time() * 1000
    h1.kill()
    reported = guest.reported(h1)
    first = arrivals.wait()
    have = guest.wait_boot(h2, since)
    lost = missing_records(have, reported)
    times = cluster.wait_state(h2, 'ALONE')['lastTakeover']
    figures.update(detection_ms=round(times['detectedMs'] - killed), arbitration_ms=times['wonMs'] - times['detectedMs'],
                   kill_to_start_ms=round(times['startCalledMs'] - killed), start_call_ms=times['startedMs'] - times['startCalledMs'],
                   kill_to_first_record_ms=round(first - killed), records_reported=reported, records_lost=lost)
    say(f"  the loss was seen after       {figures['detection_ms']:6} ms")
    say(f"  the votes were won after      {figures['arbitration_ms']:6} ms more")
    say(f"  kill to the start call        {figures['kill_to_start_ms']:6} ms")
    say(f"  the start call took           {figures['start_call_ms']:6} ms")
    say(f"  kill to the guest's next record {figures['kill_to_first_record_ms']:4} ms (its boot included)")
    say(f'  the guest had reported {reported} records as safe; missing on the disk: {lost}')
    show(cluster)

    head('4. Host h1 comes back; the VM writes on')
    guest.command(h2, 'bulk 8', 'bulk')
    cluster.reboot(h1)
    most = progress(cluster, h2, h1)
    whole = sum(os.path.getsize(os.path.join(root, f)) for root, _, files in os.walk(h2.path('/var/lib/libvirt/images/db')) for f in files)
    figures.update(resync_bytes_sent=most['bytesSent'], replica_bytes=whole)
    say(f"  in sync again: {size(most['bytesSent'])} sent of a directory of {size(whole)}")

    head('5. vmtwin swap db: the VM goes home')
    since = guest.mark(h1)
    began = time.monotonic()
    h2.vmtwin('swap', 'db')
    figures['swap_call_ms'] = round((time.monotonic() - began) * 1000)
    reported = guest.reported(h1, h2)
    have = guest.wait_boot(h1, since)
    figures['records_lost'] += missing_records(have, reported)
    figures['records_reported'] = reported
    cluster.wait_green(h1)
    say(f"  stopped there, handed over and started here within {figures['swap_call_ms'] / 1000:.1f} s; records missing: {missing_records(have, reported)}")
    show(cluster)

    head('6. Both replicas, compared')
    guest.wait_records(h1, 5)
    guest.command(h1, 'quiet', 'quiet')
    cluster.assert_equal()
    figures['replicas_equal'] = True
    errors = guest.failures(h1, h2)
    figures['guest_io_errors'] = len(errors)
    files = cluster.replica(h1)
    say(f'  {len(files)} files and folders: names, owners, modes, sizes and contents are the same; I/O errors that the guest saw: {len(errors)}')

    head('What was shown')
    say(f"  A VM lost its host. It ran again on the other one: the start call went out {figures['kill_to_start_ms'] / 1000:.1f} s after the kill, and "
        f"of {figures['records_reported']} records that its guest had reported, {figures['records_lost']} were lost.")
    say('  The host came back, got what had changed while the VM wrote on, and took the VM home. Both copies are the same.')
    return cluster, figures


def main():
    parser = argparse.ArgumentParser(description='The demo of vmtwin; see tools/demo --help.')
    parser.add_argument('--binary', required=True)
    parser.add_argument('--cache', required=True)
    parser.add_argument('--json')
    parser.add_argument('--keep', action='store_true')
    given = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda n, _: sys.exit(128 + n))
    lab = Lab(given.binary)
    try:
        cluster, figures = story(lab, os.path.abspath(given.cache))
    except LabError as error:
        logs = os.path.abspath(f'{given.cache}/../lab-logs/demo')
        lab.save_logs(logs)
        say(f'\nThe demo did not get to its end: {error}\nThe logs of its hosts are under {logs}.')
        return 1
    if given.json:
        with open(given.json, 'w') as f:
            json.dump(figures, f, indent=2)
            f.write('\n')
    if given.keep:
        atexit.unregister(lab.close)
        head('The hosts stay up (--keep)')
        for host in lab.hosts.values():
            say(f'  inside {host.name}:  nsenter -t {host.init.pid} -m -u -n     (then: {lab.binary} status, virsh list --all)')
        say(f'  take all down:  for h in {lab.cgroup}/*/; do echo 1 > $h/cgroup.kill; done; sleep 1; rmdir {lab.cgroup}/*/ {lab.cgroup}; '
            f'for n in {lab.switch} ' + ' '.join(h.netns for h in lab.hosts.values()) + f'; do ip netns del $n; done; rm -rf {lab.dir}')
        os._exit(0)
    return 0 if figures['records_lost'] == 0 and figures['guest_io_errors'] == 0 else 1


if __name__ == '__main__':
    sys.exit(main())

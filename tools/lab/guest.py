"""A small real VM: Debian's cloud kernel, an initramfs of busybox, one ext4 disk in qcow2 and one in raw.

The guest writes numbered records, odd ones to the first disk, even ones to the second, each synced and then reported on its
serial console. At each boot it says what it finds. Console lines:

    GUEST up                       user space runs
    HAVE a FIRST LAST COUNT BAD    records on the first disk (b: the second): BAD counts gaps and damaged lines
    REC N                          record N is on disk
    DONE WORD                      a command ended

Commands (lines to the second serial port): `poweroff`, `reboot`, `panic`, `bulk MIB` (rewrites so much on the second disk), `quiet` and `loud` (the writer).
"""
import glob, os, re, shutil, socket, subprocess, time
from hosts import LabError, run, wait_for, write

INIT = r'''#!/bin/sh
export PATH=/bin
mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys
while read m; do insmod /mods/$m; done < /mods/order
stty -onlcr </dev/ttyS0; stty -echo </dev/ttyS1
exec </dev/ttyS1 >/dev/ttyS0 2>&1
echo "GUEST up"
for i in 1 2 3 4 5 6 7 8 9 10; do [ -b /dev/vda ] && [ -b /dev/vdb ] && break; sleep 0.2; done
for d in a b; do
  mount -t ext4 /dev/vd$d /mnt/$d || echo "GUEST cannot mount vd$d"
  touch /mnt/$d/records
  awk -v d=$d 'function bad() { b++ } { if ($1 != "record" || $3 != "of" || $4 != $2 * 7 + 3 || NF != 4) { bad(); next } if (n > 0 && $2 != last + 2) bad(); if (n == 0) first = $2; last = $2; n++ }
    END { print "HAVE", d, first + 0, last + 0, n + 0, b + 0 }' /mnt/$d/records
done
last=$( (tail -n 1 /mnt/a/records; tail -n 1 /mnt/b/records) | awk '$2 > m { m = $2 } END { print m + 0 }')
# The writer rests: at a power-off the kernel takes the disks away from under whoever writes on.
hush() { touch /quiet; until [ -e /idle ]; do sleep 0.1; done; sync; }
# The power button, as libvirt's shutdown presses it.
( for e in /dev/input/event*; do ( dd if=$e bs=24 count=1 of=/dev/null 2>/dev/null && hush && poweroff -f ) & done; wait ) &
writer() {
  n=$1
  while :; do
    n=$((n + 1)); d=a; [ $((n % 2)) = 0 ] && d=b
    echo "record $n of $((n * 7 + 3))" >> /mnt/$d/records && sync /mnt/$d/records && echo "REC $n" || echo "FAILED $n"
    while [ -e /quiet ]; do touch /idle; sleep 0.2; done; rm -f /idle
    usleep 20000
  done
}
writer $last &
while read word arg; do
  case $word in
    poweroff) hush; poweroff -f;;
    reboot) hush; reboot -f;;
    panic) echo c > /proc/sysrq-trigger;;
    bulk) dd if=/dev/urandom of=/mnt/b/bulk bs=1M count=$arg conv=notrunc,fsync 2>/dev/null; echo "DONE bulk";;
    quiet) hush; echo "DONE quiet";;
    loud) rm -f /quiet; echo "DONE loud";;
  esac
done
sleep 1000000
'''

APPLETS = 'sh mount umount insmod cat echo sleep usleep dd ls mkdir stty poweroff reboot sync touch tail awk rm head'.split()


def kernel(cache):
    """Debian's cloud kernel and its modules, fetched as a package and unpacked into `cache` (nothing is installed)."""
    found = glob.glob(f'{cache}/boot/vmlinuz-*')
    if not found:
        os.makedirs(cache, exist_ok=True)
        text = run('apt-cache', 'depends', 'linux-image-cloud-amd64').stdout
        names = re.findall(r'Depends: (linux-image-\S+)', text)
        if not names:
            raise LabError('apt knows no linux-image-cloud-amd64: run apt-get update')
        run('apt-get', 'download', names[0], cwd=cache, timeout=600)
        for package in glob.glob(f'{cache}/{names[0]}_*.deb'):
            run('dpkg-deb', '-x', package, cache)
            os.remove(package)
        found = glob.glob(f'{cache}/boot/vmlinuz-*')
    if len(found) != 1:
        raise LabError(f'{cache}: expected one kernel, found {found}')
    image = found[0]
    return image, f'{cache}/lib/modules/{os.path.basename(image)[len("vmlinuz-"):]}'


def modules_in_order(folder, wanted):
    """The modules and what they need, in load order; built-in ones are left out."""
    order = []

    def need(name):
        pattern = re.compile('^' + re.escape(name).replace('_', '[-_]').replace(r'\-', '[-_]') + r'\.ko')
        for root, _, files in os.walk(f'{folder}/kernel'):
            for file in files:
                if pattern.match(file):
                    path = f'{root}/{file}'
                    if path in order:
                        return
                    depends = run('modinfo', '-F', 'depends', path).stdout.strip()
                    for other in filter(None, depends.split(',')):
                        need(other)
                    order.append(path)
                    return
    for name in wanted:
        need(name)
    return order


def initramfs(out, modules_folder):
    """Writes the guest's initramfs."""
    root = out + '.d'
    shutil.rmtree(root, ignore_errors=True)
    for sub in 'bin dev proc sys mnt/a mnt/b mods'.split():
        os.makedirs(f'{root}/{sub}')
    busybox = shutil.which('busybox') or '/bin/busybox'
    shutil.copy2(busybox, f'{root}/bin/busybox')
    for applet in APPLETS:
        os.symlink('busybox', f'{root}/bin/{applet}')
    order = modules_in_order(modules_folder, ['virtio_pci', 'virtio_blk', 'button', 'evdev', 'ext4'])
    for path in order:
        shutil.copy2(path, f'{root}/mods/')
    write(f'{root}/mods/order', ''.join(os.path.basename(p) + '\n' for p in order))
    write(f'{root}/init', INIT)
    os.chmod(f'{root}/init', 0o755)
    subprocess.run(f'cd {root} && find . -print0 | cpio --null -o -H newc --quiet | gzip -1 > {out}', shell=True, check=True)
    shutil.rmtree(root)


def accelerator():
    """'qemu' (TCG, runs everywhere), or what VMTWIN_LAB_ACCEL says ('kvm'). Not guessed: a /dev/kvm that opens may still boot no stock kernel."""
    return os.environ.get('VMTWIN_LAB_ACCEL', 'qemu')


class Guest:
    """The VM `name` on a host, as virt-install would leave it: disks lying flat in the images folder, kernel beside them."""

    def __init__(self, lab, name='db', memory_mib=192):
        self.lab, self.name, self.memory = lab, name, memory_mib
        self.console_offset = {}

    def install(self, host, cache, disk_mib=192):
        """Makes the disks, the kernel and the definition on `host`."""
        images = host.path('/var/lib/libvirt/images')
        image, modules = kernel(cache)
        shutil.copy2(image, f'{images}/{self.name}-vmlinuz')
        initramfs(f'{images}/{self.name}-initrd.gz', modules)
        for disk in 'ab':
            raw = f'{images}/{self.name}-{disk}.raw'
            with open(raw, 'wb') as f:
                f.truncate(disk_mib << 20)
            run('mkfs.ext4', '-q', '-F', '-m', '0', '-E', 'lazy_itable_init=0,lazy_journal_init=0', raw)
        run('qemu-img', 'convert', '-f', 'raw', '-O', 'qcow2', f'{images}/{self.name}-a.raw', f'{images}/{self.name}-a.qcow2')
        os.remove(f'{images}/{self.name}-a.raw')
        xml = self.xml()
        write(host.path('/srv/') + f'{self.name}.xml', xml)
        host.virsh('define', f'/srv/{self.name}.xml')

    def xml(self):
        base = f'/var/lib/libvirt/images/{self.name}'
        return f'''<domain type='{accelerator()}'>
  <name>{self.name}</name>
  <memory unit='MiB'>{self.memory}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{base}-vmlinuz</kernel>
    <initrd>{base}-initrd.gz</initrd>
    <cmdline>console=ttyS0 quiet panic=1 mitigations=off random.trust_cpu=on no_timer_check</cmdline>
  </os>
  <features><acpi/></features>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none' io='io_uring' discard='unmap'/>
      <source file='{base}-a.qcow2'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='none' io='io_uring' discard='unmap'/>
      <source file='{base}-b.raw'/>
      <target dev='vdb' bus='virtio'/>
    </disk>
    <serial type='file'>
      <source path='/var/log/libvirt/{self.name}.console' append='on'/>
      <target port='0'/>
    </serial>
    <serial type='unix'>
      <source mode='bind' path='/run/libvirt/{self.name}.commands'/>
      <target port='1'/>
    </serial>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
</domain>
'''

    def console(self, host):
        """All that the guest said on this host so far, as lines."""
        try:
            return open(host.path(f'/var/log/libvirt/{self.name}.console'), errors='replace').read().replace('\r', '').split('\n')
        except FileNotFoundError:
            return []

    def mark(self, host):
        """A place in the host's console to look from: the line that is being written, or will be next."""
        return max(0, len(self.console(host)) - 1)

    def lines(self, host, word, since=0):
        """Lines that begin with `word`, whole ones only (the last may still be on its way)."""
        return [line.split() for line in self.console(host)[since:-1] if line.split()[:1] == [word]]

    def reported(self, *hosts):
        """Highest record that the guest reported on these hosts."""
        return max([int(l[1]) for h in hosts for l in self.lines(h, 'REC') if len(l) == 2 and l[1].isdigit()], default=0)

    def wait_records(self, host, count, since=0, seconds=180):
        """Waits until `count` more records were reported after `since`; the last of them."""
        return wait_for(f'{count} records of {self.name} on {host.name}',
                        lambda: [int(l[1]) for l in self.lines(host, 'REC', since)][count - 1:] if len(self.lines(host, 'REC', since)) >= count else None,
                        seconds)[-1]

    def wait_boot(self, host, since=0, seconds=180):
        """Waits until the guest said what it found on both disks; {'a': (first, last, count, bad), 'b': ...}."""
        def found():
            have = {l[1]: tuple(map(int, l[2:6])) for l in self.lines(host, 'HAVE', since) if len(l) == 6}
            return have if len(have) == 2 else None
        return wait_for(f'{self.name} to boot on {host.name}', found, seconds)

    def failures(self, *hosts):
        """I/O errors that the guest saw; there must be none."""
        return [' '.join(l) for h in hosts for w in ('FAILED', 'GUEST') for l in self.lines(h, w) if l != ['GUEST', 'up']] + \
            [line for h in hosts for line in self.console(h) if 'I/O error' in line or 'Remounting filesystem read-only' in line]

    def command(self, host, text, answer=None, seconds=120):
        """Sends a line to the guest's second serial port."""
        since = self.mark(host)
        path = f'/proc/{host.init.pid}/root/run/libvirt/{self.name}.commands'
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(path)
            s.sendall(text.encode() + b'\n')
            if answer:
                wait_for(f'"{answer}" of the guest', lambda: [l for l in self.lines(host, 'DONE', since) if l[1:] == answer.split()], seconds)
            else:
                time.sleep(0.2)


def missing_records(have, reported):
    """How many of the reported records are not on the disks that the guest found at its boot."""
    lost = sum(bad for _, _, _, bad in have.values())
    for disk, odd in (('a', 1), ('b', 0)):
        first, last, count, _ = have[disk]
        should = (reported + 1) // 2 if odd else reported // 2
        lost += max(0, should - count)
    return lost

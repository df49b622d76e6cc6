"""Hypervisor hosts on one machine: each is a network, mount and UTS namespace with a cgroup, /etc, /run, /var/lib, /var/log and
/var/cache of its own, a boot id of its own, and a private libvirtd. Nothing of it touches the machine's own folders, and all
of it goes away with `Lab.close`.

Networks (in the lab's own switch namespace): `m0` 10.77.0.N management, `r0` 10.78.0.N replication.
"""
import atexit, fcntl, os, shutil, signal, struct, subprocess, sys, tempfile, time, uuid

HERE = os.path.dirname(os.path.abspath(__file__))
TREE = os.path.dirname(os.path.dirname(HERE))


class LabError(Exception):
    pass


def run(*args, check=True, quiet=False, timeout=120, **more):
    """Runs a command; its output in the error when it fails."""
    done = subprocess.run([str(a) for a in args], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          timeout=timeout, **more)
    if check and done.returncode != 0:
        raise LabError(f"{' '.join(map(str, args))}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def wait_for(what, test, seconds=120, every=0.1):
    """Asks until the answer is true-ish and returns it. The limit is generous: it tells 'never' from 'late', nothing more."""
    until = time.monotonic() + seconds
    last = None
    while True:
        try:
            found = test()
            if found:
                return found
            last = found
        except (LabError, OSError, ValueError, KeyError) as error:
            last = error
        if time.monotonic() > until:
            raise LabError(f"waited {seconds} s in vain for: {what} (last: {last})")
        time.sleep(every)


def cgroup_root():
    """Where the unified hierarchy is mounted."""
    for line in open('/proc/mounts'):
        _, where, kind, *_ = line.split()
        if kind == 'cgroup2':
            return where
    raise LabError("no cgroup v2 hierarchy is mounted: mount one (mount -t cgroup2 none /sys/fs/cgroup/unified)")


class Lab:
    """All hosts of one run. Use as a context manager, or call `close`."""

    def __init__(self, binary, keep_logs=None):
        if os.geteuid() != 0:
            raise LabError("the lab needs root: namespaces, mounts and a libvirtd of its own")
        for need in ('/dev/fuse',):
            if not os.path.exists(need):
                raise LabError(f"{need} is missing: this kernel cannot run the lab")
        if not os.path.isfile(binary):
            raise LabError(f'{binary} is not there: build it first')
        self.dir = tempfile.mkdtemp(prefix='vmtwin-lab.', dir='/var/tmp')
        os.chmod(self.dir, 0o755)
        self.tag = uuid.uuid4().hex[:5]
        self.hosts = {}
        self.keep_logs = keep_logs
        self.closed = False
        os.mkdir(f'{self.dir}/bin')
        self.binary = f'{self.dir}/bin/vmtwin'
        shutil.copy2(binary, self.binary)
        self.cgroup = f'{cgroup_root()}/vmtwin-lab-{self.tag}'
        os.mkdir(self.cgroup)
        self.switch = f'vl{self.tag}sw'
        atexit.register(self.close)
        run('ip', 'netns', 'add', self.switch)
        for bridge in ('brm', 'brr'):
            run('ip', '-n', self.switch, 'link', 'add', bridge, 'type', 'bridge')
            run('ip', '-n', self.switch, 'link', 'set', bridge, 'up')

    def host(self, name, number, libvirt=True, forgetful_mib=None):
        """Makes and boots one; `forgetful_mib`: its /var/lib lies on a disk of that size that forgets what was not flushed when the power goes."""
        host = Host(self, name, number, libvirt, ForgetfulDisk(f'{self.dir}/{name}', forgetful_mib) if forgetful_mib else None)
        self.hosts[name] = host
        host.boot()
        return host

    def close(self):
        if self.closed:
            return
        self.closed = True
        if self.keep_logs:
            self.save_logs(self.keep_logs)
        for host in self.hosts.values():
            try:
                host.kill()
            except (LabError, OSError) as error:
                print(f'lab: {host.name} did not go down: {error}', file=sys.stderr)
        run('ip', 'netns', 'del', self.switch, check=False)
        for host in self.hosts.values():
            if host.disk:
                host.disk.off()
            try:
                os.rmdir(host.cgroup)
            except OSError as error:
                print(f'lab: {host.cgroup} stays: {error}', file=sys.stderr)
        try:
            os.rmdir(self.cgroup)
        except OSError as error:
            print(f'lab: {self.cgroup} stays: {error}', file=sys.stderr)
        shutil.rmtree(self.dir, ignore_errors=True)

    def save_logs(self, where):
        """Copies every host's logs to a folder."""
        for host in self.hosts.values():
            to = f'{where}/{host.name}'
            os.makedirs(to, exist_ok=True)
            for root in (f'{host.dir}/log/vmtwin', f'{host.dir}/log/libvirt', f'{host.dir}/out'):
                if os.path.isdir(root):
                    shutil.copytree(root, f'{to}/{os.path.basename(root)}', dirs_exist_ok=True, ignore_dangling_symlinks=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Host:
    """One host. Its files: etc, run, lib (/var/lib), log, cache, srv, out (what its processes printed)."""

    def __init__(self, lab, name, number, libvirt, disk=None):
        self.lab, self.name, self.number, self.libvirt, self.disk = lab, name, number, libvirt, disk
        self.dir = f'{lab.dir}/{name}'
        self.cgroup = f'{lab.cgroup}/{name}'
        self.netns = f'vl{lab.tag}{name}'
        self.address = f'10.77.0.{number}'
        self.replication = f'10.78.0.{number}'
        self.init = None
        self.boots = 0
        self.processes = []
        os.mkdir(self.cgroup)
        if disk:
            disk.make()
        for sub in ('run', 'lib/libvirt/images', 'lib/vmtwin', 'log/libvirt', 'cache/libvirt', 'srv', 'out'):
            os.makedirs(f'{self.dir}/{sub}')
        run('chmod', '755', self.dir, f'{self.dir}/lib', f'{self.dir}/lib/libvirt', f'{self.dir}/lib/libvirt/images', f'{self.dir}/log',
            f'{self.dir}/log/libvirt', f'{self.dir}/cache', f'{self.dir}/run')
        run('cp', '-a', '/etc', f'{self.dir}/etc')
        etc = f'{self.dir}/etc'
        shutil.rmtree(f'{etc}/vmtwin', ignore_errors=True)
        shutil.rmtree(f'{etc}/libvirt', ignore_errors=True)
        os.makedirs(f'{etc}/libvirt/qemu')
        write(f'{etc}/hostname', name + '\n')
        write(f'{etc}/hosts', '127.0.0.1 localhost\n' + ''.join(f'10.77.0.{n} h{n}\n' for n in range(1, 9)) + f'{self.address} {name}\n')
        # Distinct host ids, or libvirt takes the two for one. Its access by root only, as on Debian.
        write(f'{etc}/libvirt/libvirtd.conf', f'host_uuid = "{uuid.uuid4()}"\nauth_unix_rw = "none"\nlog_outputs = "3:file:/var/log/libvirt/libvirtd.log"\n')
        # Debian's user and dynamic ownership, as users have them: owners and permissions are part of what is tested.
        write(f'{etc}/libvirt/qemu.conf', 'security_driver = "none"\ncgroup_controllers = []\nnamespaces = []\nstdio_handler = "file"\n')

    # ---- power

    def boot(self):
        """Power on: a new boot id, an empty /run, the namespaces, the links, libvirtd."""
        self.boots += 1
        if self.disk and not self.disk.on:
            self.disk.power_on()
        shutil.rmtree(f'{self.dir}/run', ignore_errors=True)
        os.makedirs(f'{self.dir}/run/libvirt')
        os.makedirs(f'{self.dir}/run/lock')
        # libvirt remembers owners in xattrs that hold good until the next boot of the machine; that this host booted it cannot see.
        for log in os.listdir(f'{self.dir}/log/libvirt'):
            for name in os.listxattr(f'{self.dir}/log/libvirt/{log}'):
                if name.startswith('trusted.libvirt.'):
                    os.removexattr(f'{self.dir}/log/libvirt/{log}', name)
        write(f'{self.dir}/boot_id', f'{uuid.uuid4()}\n')
        run('ip', 'netns', 'add', self.netns)
        run('ip', '-n', self.netns, 'link', 'set', 'lo', 'up')
        for kind, address in (('m', self.address), ('r', self.replication)):
            port = f'p{kind}{self.name}'
            run('ip', 'link', 'add', f'{kind}0', 'netns', self.netns, 'type', 'veth', 'peer', 'name', port, 'netns', self.lab.switch)
            run('ip', '-n', self.lab.switch, 'link', 'set', port, 'master', f'br{kind}', 'up')
            run('ip', '-n', self.netns, 'link', 'set', f'{kind}0', 'up')
            run('ip', '-n', self.netns, 'addr', 'add', f'{address}/24', 'dev', f'{kind}0')
        d = self.dir
        script = f'''set -e
hostname {self.name}
# Disks of other hosts came along with the mount table; a reference kept here would keep their file systems alive over a power cut.
for m in $(awk '$2 ~ "^{self.lab.dir}/" && $2 !~ "^{d}/" {{ print $2 }}' /proc/self/mounts | sort -r); do umount -l $m; done
for pair in etc:/etc run:/run lib:/var/lib log:/var/log cache:/var/cache srv:/srv; do mount --bind {d}/${{pair%%:*}} ${{pair#*:}}; done
mount --bind {d}/boot_id /proc/sys/kernel/random/boot_id
exec sleep infinity
'''
        self.init = self._spawn(['nsenter', f'--net=/run/netns/{self.netns}', 'unshare', '-m', '-u', '--propagation', 'private', 'sh', '-c', script], 'init')
        wait_for(f'namespaces of {self.name}', lambda: open(f'/proc/{self.init.pid}/comm').read() == 'sleep\n' or self._died())
        if self.libvirt:
            self.spawn('libvirtd', '/usr/sbin/libvirtd', '-p', '/run/libvirtd.pid')
            wait_for(f'libvirtd of {self.name}', lambda: self.sh('virsh -c qemu:///system list >/dev/null 2>&1', check=False).returncode == 0)

    def _died(self):
        if self.init.poll() is not None:
            raise SystemExit(f'lab: {self.name} did not come up: ' + open(f'{self.dir}/out/init').read())
        return False

    def kill(self):
        """Power off without warning: the links first, then all processes at once. Returns when all are gone; a forgetful disk has forgotten then."""
        for kind in 'mr':
            run('ip', '-n', self.lab.switch, 'link', 'del', f'p{kind}{self.name}', check=False)
        if os.path.exists(f'{self.cgroup}/cgroup.freeze'):
            write(f'{self.cgroup}/cgroup.freeze', '0')
        write(f'{self.cgroup}/cgroup.kill', '1')
        wait_for(f'the processes of {self.name} to be gone', lambda: not open(f'{self.cgroup}/cgroup.procs').read().strip(), every=0.01)
        for process in self.processes:
            process.wait()
        self.processes = []
        self.init = None
        run('ip', 'netns', 'del', self.netns, check=False)
        if self.disk and self.disk.on:
            self.disk.cut()

    @property
    def up(self):
        return self.init is not None

    def freeze(self, frozen):
        """Stops all of the host's processes (a host that pauses), or lets them go on."""
        write(f'{self.cgroup}/cgroup.freeze', '1' if frozen else '0')
        wait_for('freeze', lambda: f'frozen {int(frozen)}' in open(f'{self.cgroup}/cgroup.events').read(), every=0.01)

    # ---- network

    def link(self, kind, up):
        """Cuts ('m' or 'r') this host's cable to the switch, or mends it."""
        run('ip', '-n', self.lab.switch, 'link', 'set', f'p{kind}{self.name}', 'up' if up else 'down')

    def deaf_to(self, other, deaf):
        """Drops all that arrives from another host, on both networks; alone it is a one-way cut, on both sides a whole one."""
        if deaf:
            rules = f'''table inet cut {{
    chain input {{
        type filter hook input priority 0;
        ip saddr {{ {other.address}, {other.replication} }} drop
    }}
}}'''
            self.sh(f"nft -f - <<'X'\n{rules}\nX")
        else:
            self.sh('nft delete table inet cut')

    # ---- processes

    def _enter(self):
        return ['nsenter', '-t', str(self.init.pid), '-m', '-u', '-n', '--']

    def _spawn(self, args, log):
        """Starts a process in this host's cgroup, its output to `out/LOG`."""
        procs = f'{self.cgroup}/cgroup.procs'

        def enter():
            with open(procs, 'w') as f:
                f.write('0')
        with open(f'{self.dir}/out/{log}', 'ab') as out:
            process = subprocess.Popen(args, stdin=subprocess.DEVNULL, stdout=out, stderr=out, preexec_fn=enter, start_new_session=True, cwd='/')
        self.processes.append(process)
        return process

    def spawn(self, log, *args):
        """Starts a process that stays, inside the host."""
        return self._spawn(self._enter() + list(map(str, args)), log)

    def sh(self, command, check=True, timeout=180):
        """Runs a shell command inside the host."""
        procs = f'{self.cgroup}/cgroup.procs'

        def enter():
            with open(procs, 'w') as f:
                f.write('0')
        return run(*self._enter(), 'sh', '-c', command, check=check, timeout=timeout, preexec_fn=enter, cwd='/')

    def vmtwin(self, *args, check=True, timeout=180):
        """Runs the product's command inside the host."""
        import shlex
        return self.sh(f'exec {self.lab.binary} ' + ' '.join(shlex.quote(str(a)) for a in args), check=check, timeout=timeout)

    def virsh(self, *args, check=True, timeout=120):
        import shlex
        return self.sh('exec virsh -q -c qemu:///system ' + ' '.join(shlex.quote(str(a)) for a in args), check=check, timeout=timeout)

    def pids(self, *needles):
        """Process ids in this host whose command line holds all the words."""
        found = []
        for pid in open(f'{self.cgroup}/cgroup.procs').read().split():
            try:
                line = open(f'/proc/{pid}/cmdline').read().split('\0')
            except OSError:
                continue
            if all(any(n == w or w.endswith('/' + n) for w in line) for n in needles):
                found.append(int(pid))
        return found

    def path(self, inside):
        """Where a file of the host's own folders (not under a mount) lies outside."""
        for prefix, sub in (('/var/lib', 'lib'), ('/var/log', 'log'), ('/run', 'run'), ('/etc', 'etc'), ('/srv', 'srv')):
            if inside.startswith(prefix + '/'):
                return f'{self.dir}/{sub}{inside[len(prefix):]}'
        raise LabError(f'{inside} is not a folder of the host')

    def signal(self, pid, what):
        os.kill(pid, getattr(signal, what))


class ForgetfulDisk:
    """An ext4 at DIR/lib whose unflushed writes die with the power.

    An inner file system on a buffered loop device, whose image lies in an outer one on a direct loop device: a flush of the inner one is an fsync of
    its image; the power cut is ext4's SHUTDOWN ioctl, without a flush of its log, on the outer one.
    """
    SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, 2

    def __init__(self, dir, size_mib):
        self.dir, self.size, self.on = dir, size_mib, False

    def make(self):
        os.makedirs(f'{self.dir}/outer')
        os.makedirs(f'{self.dir}/lib')
        run('truncate', '-s', f'{self.size * 9 // 8 + 64}M', f'{self.dir}/outer.img')
        run('mkfs.ext4', '-q', '-F', f'{self.dir}/outer.img')
        self._outer()
        run('fallocate', '-l', f'{self.size}M', f'{self.dir}/outer/inner.img')
        run('mkfs.ext4', '-q', '-F', f'{self.dir}/outer/inner.img')
        run('sync', '-f', f'{self.dir}/outer')
        run('mount', '-o', 'loop', f'{self.dir}/outer/inner.img', f'{self.dir}/lib')
        self.on = True

    def _outer(self):
        self.loop = run('losetup', '--find', '--show', '--direct-io=on', f'{self.dir}/outer.img').stdout.strip()
        # A long commit interval: nothing becomes durable by itself.
        run('mount', '-o', 'commit=300', self.loop, f'{self.dir}/outer')

    def power_on(self):
        self._outer()
        run('mount', '-o', 'loop', f'{self.dir}/outer/inner.img', f'{self.dir}/lib')
        self.on = True

    def cut(self):
        self.on = False
        fd = os.open(f'{self.dir}/outer', os.O_RDONLY)
        fcntl.ioctl(fd, self.SHUTDOWN, struct.pack('I', self.NO_LOG_FLUSH))
        os.close(fd)
        self._unmount()

    def off(self):
        """For good."""
        if self.on:
            self.on = False
            self._unmount()

    def _unmount(self):
        for mount in ('lib', 'outer'):
            wait_for(f'{self.dir}/{mount} to be unmounted', lambda: run('umount', f'{self.dir}/{mount}', check=False).returncode in (0, 32)
                     and f'{self.dir}/{mount} ' not in open('/proc/mounts').read(), 60)
        run('losetup', '-d', self.loop, check=False)


def write(path, text):
    with open(path, 'w') as f:
        f.write(text)

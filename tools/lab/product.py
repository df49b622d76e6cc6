"""vmtwin in the lab: a cluster of h1, h2 and the witness w1, one protected VM, and what one asks of them."""
import hashlib, json, os, stat
from hosts import LabError, wait_for


class Cluster:
    def __init__(self, lab, clear_link=False, forgetful=False):
        self.lab = lab
        disk = 768 if forgetful else None
        self.h1 = lab.host('h1', 1, forgetful_mib=disk)
        self.h2 = lab.host('h2', 2, forgetful_mib=disk)
        self.w1 = lab.host('w1', 3, libvirt=False)
        self.clear_link = clear_link
        self.witness_process = None

    @property
    def nodes(self):
        return [self.h1, self.h2]

    def other(self, host):
        return self.h2 if host is self.h1 else self.h1

    def form(self):
        """Makes the cluster: daemons, authority, the second node's and the witness's joins."""
        for host in self.nodes:
            self.start_node(host)
        clear = ['--replication-tls', 'off'] if self.clear_link else []
        self.h1.vmtwin('cluster', 'init', '--name', 'lab', '--node', 'h1', '--address', self.h1.address, '--replication-address', self.h1.replication,
                       '--witness', f'w1={self.w1.address}', *clear)
        self.h2.vmtwin('cluster', 'join', self.token(), '--node', 'h2', '--address', self.h2.address, '--replication-address', self.h2.replication, *clear)
        self.w1.vmtwin('cluster', 'join', self.token(), '--witness', 'w1', '--state', '/var/lib/vmtwin-witness')
        self.start_witness()

    def token(self):
        """A one-time join token from h1."""
        return self.h1.vmtwin('cluster', 'token').stdout.strip().split()[-1]

    def start_node(self, host):
        host.daemon = host.spawn('node', self.lab.binary, 'node')
        wait_for(f"{host.name}'s daemon", lambda: host.vmtwin('status', check=False).returncode in (0, 1, 3))

    def start_witness(self):
        self.witness_process = self.w1.spawn('witness', self.lab.binary, 'witness', '--state', '/var/lib/vmtwin-witness')

    def reboot(self, host):
        """Power on after `host.kill()`."""
        host.boot()
        if host is self.w1:
            self.start_witness()
        else:
            self.start_node(host)

    def protect(self, guest, host=None):
        host = host or self.h1
        host.vmtwin('protect', guest.name, '--peer', self.other(host).name, timeout=300)

    # ---- status

    def status(self, ask, module='db'):
        """{node: status} as `ask` knows it."""
        done = ask.vmtwin('status', module, '--json')
        return {m['node']: m for m in json.loads(done.stdout)['modules'] if m['module'] == module}

    def state(self, host, module='db'):
        """State of `host`'s own module, asked of itself; '?' where nothing answers."""
        try:
            return self.status(host, module)[host.name]
        except (LabError, KeyError, ValueError):
            return {'state': '?', 'health': '?', 'reason': 'no answer'}

    def wait_state(self, host, *wanted, health=None, seconds=180, module='db'):
        """Waits until `host` is in one of the states (and health)."""
        seen = {}

        def there():
            seen.update(self.state(host, module))
            return seen['state'] in wanted and health in (None, seen['health']) and dict(seen)
        try:
            return wait_for(f'{host.name} to be {"/".join(wanted)} {health or ""}', there, seconds)
        except LabError as error:
            raise LabError(f"{error}; it is {seen.get('state')} {seen.get('health')}: {seen.get('reason')}") from None

    def wait_green(self, holder, seconds=240, module='db'):
        """Waits until `holder` is PRIM and its peer SECOND, both green."""
        self.wait_state(holder, 'PRIM', health='green', seconds=seconds, module=module)
        self.wait_state(self.other(holder), 'SECOND', health='green', seconds=seconds, module=module)

    def running_on(self, name='db'):
        """Names of the hosts where the VM has a process."""
        return [h.name for h in self.nodes if h.up and h.pids('qemu-system-x86_64', f'guest={name},debug-threads=on')]

    # ---- the replicas

    def replica(self, host, name='db'):
        """Names, types, owners, sizes and contents of a replica, as it lies on the disk below the mount."""
        root = host.path(f'/var/lib/libvirt/images/{name}')
        found = {}
        for folder, folders, files in os.walk(root):
            if folder == root and '.vmtwin-local' in folders:
                folders.remove('.vmtwin-local')
            for entry in folders + files:
                path = f'{folder}/{entry}'
                about = os.lstat(path)
                what = [stat.S_IFMT(about.st_mode), stat.S_IMODE(about.st_mode), about.st_uid, about.st_gid]
                if stat.S_ISREG(about.st_mode):
                    digest = hashlib.blake2b()
                    with open(path, 'rb') as f:
                        while chunk := f.read(1 << 20):
                            digest.update(chunk)
                    what += [about.st_size, digest.hexdigest()]
                elif stat.S_ISLNK(about.st_mode):
                    what.append(os.readlink(path))
                found[path[len(root):]] = tuple(what)
        return found

    def differences(self, name='db'):
        """Paths in which the two replicas differ. Both must be quiet."""
        one, two = self.replica(self.h1, name), self.replica(self.h2, name)
        return sorted(p for p in one.keys() | two.keys() if one.get(p) != two.get(p))

    def assert_equal(self, name='db'):
        """Both replicas hold files, and the same."""
        if not self.replica(self.h1, name):
            raise LabError('the replica is empty')
        # A guest that is quiet may still have a last journal commit on its way.
        wait_for('both replicas to be equal', lambda: not self.differences(name) or (_ for _ in ()).throw(ValueError(self.differences(name))), 60, 1)

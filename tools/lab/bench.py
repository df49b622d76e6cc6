"""The benchmark: see tools/bench. fio (io_uring, direct) inside h1 on a file of 1 GiB, fully written before."""
import argparse, json, os, statistics, sys, time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from hosts import Lab, LabError  # noqa: E402
from guest import Guest  # noqa: E402
from product import Cluster  # noqa: E402

WORKLOADS = [
    ('4k write, depth 1', 'randwrite', '4k', 1),
    ('4k write, depth 32', 'randwrite', '4k', 32),
    ('4k read, depth 1', 'randread', '4k', 1),
    ('4k read, depth 32', 'randread', '4k', 32),
    ('1M write, depth 8', 'write', '1M', 8),
    ('1M read, depth 8', 'read', '1M', 8),
]
FILE_MIB = 1024


class Setup:
    """One way to a file: a pair of hosts of its own, its guest idle."""

    def __init__(self, name, binary, cache, mirrored, clear):
        self.name, self.mirrored = name, mirrored
        self.lab = Lab(binary)
        self.cluster = Cluster(self.lab, clear)
        self.cluster.form()
        guest = Guest(self.lab)
        guest.install(self.cluster.h1, cache)
        self.cluster.protect(guest)
        self.cluster.wait_green(self.cluster.h1)
        guest.wait_boot(self.cluster.h1)
        guest.command(self.cluster.h1, 'quiet', 'quiet')
        if not mirrored:
            self.cluster.h1.vmtwin('stop', 'db', '--node', 'h2')
            self.cluster.wait_state(self.cluster.h1, 'ALONE')
        self.place = '/var/lib/libvirt/images/db'
        self.fill()

    def fill(self):
        self.fio('write', '1M', 8, whole=True)

    def fio(self, pattern, block, depth, seconds=2, whole=False):
        """One run; its JSON."""
        how = '' if whole else f'--time_based --runtime={seconds} --ramp_time=0.3'
        out = self.cluster.h1.sh(f'exec fio --name=b --filename={self.place}/bench.raw --size={FILE_MIB}m --rw={pattern} --bs={block} --iodepth={depth} '
                                 f'--ioengine=io_uring --direct=1 --randrepeat=0 --norandommap --output-format=json {how}', timeout=300).stdout
        return json.loads(out[out.index('{'):])['jobs'][0]

    def cpu_us(self, host):
        for line in open(f'{host.cgroup}/cpu.stat'):
            if line.startswith('usage_usec'):
                return int(line.split()[1])
        raise LabError('no usage_usec in cpu.stat')

    def measure(self, pattern, block, depth, seconds):
        before = [self.cpu_us(h) for h in self.cluster.nodes]
        job = self.fio(pattern, block, depth, seconds)
        after = [self.cpu_us(h) for h in self.cluster.nodes]
        side = job['read' if 'read' in pattern else 'write']
        count = max(1, side['total_ios'])
        # fio itself runs in h1's cgroup: its own time is taken off. Ramp time counts in the group and not in fio's count: scaled.
        own = (job['usr_cpu'] + job['sys_cpu']) / 100 * job['job_runtime'] * 1000
        scale = seconds / (seconds + 0.3)
        holder, second = after[0] - before[0], after[1] - before[1]
        percent = side['clat_ns'].get('percentile', {})
        return {'iops': side['iops'], 'mib': side['bw'] / 1024, 'p50_us': percent.get('50.000000', 0) / 1000, 'p99_us': percent.get('99.000000', 0) / 1000,
                'cpu_s_per_million_holder': max(0.0, (holder * scale - own) / count), 'cpu_s_per_million_second': second * scale / count}

    def pss_mib(self):
        """Memory of both module processes."""
        found = []
        for host in self.cluster.nodes:
            for pid in host.pids('vmtwin', 'module', 'db'):
                for line in open(f'/proc/{pid}/smaps_rollup'):
                    if line.startswith('Pss:'):
                        found.append(round(int(line.split()[1]) / 1024, 1))
        return found


class Local(Setup):
    """The plain directory of the host of another setup."""

    def __init__(self, other):
        self.name, self.cluster, self.place = 'local directory', other.cluster, '/srv'
        self.fill()


def main():
    parser = argparse.ArgumentParser(description='Benchmark of the data path; see tools/bench --help.')
    parser.add_argument('--binary', required=True)
    parser.add_argument('--cache', required=True)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--seconds', type=int, default=2)
    parser.add_argument('--json')
    parser.add_argument('--no-rest', action='store_true', help='without the 60 s of rest before the memory is read')
    given = parser.parse_args()
    setups = []
    try:
        for name, mirrored, clear in (('mount, no peer', False, False), ('mirrored, TLS', True, False), ('mirrored, clear', True, True)):
            print(f'setting up: {name}', flush=True)
            setups.append(Setup(name, given.binary, os.path.abspath(given.cache), mirrored, clear))
        ways = [Local(setups[0])] + setups
        results = {way.name: {w[0]: [] for w in WORKLOADS} for way in ways}
        for turn in range(given.rounds):
            for name, pattern, block, depth in WORKLOADS:
                for way in ways:
                    results[way.name][name].append(way.measure(pattern, block, depth, given.seconds))
            print(f'round {turn + 1} of {given.rounds} done', flush=True)
        rest = []
        if not given.no_rest:
            print('60 s of rest', flush=True)
            time.sleep(60)
            rest = setups[1].pss_mib()
        medians = {way: {w: {k: statistics.median(r[k] for r in runs) for k in runs[0]} for w, runs in of.items()} for way, of in results.items()}
        show(medians, [way.name for way in ways], rest)
        if given.json:
            with open(given.json, 'w') as f:
                json.dump({'rounds': given.rounds, 'seconds': given.seconds, 'medians': medians, 'pss_mib_at_rest': rest}, f, indent=2)
    finally:
        for setup in setups:
            setup.lab.close()
    return 0


def show(medians, ways, rest):
    print('\nIOPS (1M: MiB/s), medians; in brackets the ratio to the local directory')
    print(f"{'':20}" + ''.join(f'{w:>26}' for w in ways))
    for name, *_ in WORKLOADS:
        unit = 'mib' if name.startswith('1M') else 'iops'
        base = medians[ways[0]][name][unit]
        print(f'{name:20}' + ''.join(f"{medians[w][name][unit]:>18,.0f} ({medians[w][name][unit] / base:4.2f})" for w in ways))
    print('\nlatency p50 / p99, us')
    for name, *_ in WORKLOADS:
        print(f'{name:20}' + ''.join(f"{medians[w][name]['p50_us']:>15,.0f} /{medians[w][name]['p99_us']:>9,.0f}" for w in ways))
    print("\nCPU seconds per million operations: holder without fio / second (each host's cgroup, io_uring workers included)")
    for name, *_ in WORKLOADS:
        print(f'{name:20}' + ''.join(f"{medians[w][name]['cpu_s_per_million_holder']:>15,.1f} /{medians[w][name]['cpu_s_per_million_second']:>9,.1f}" for w in ways))
    if rest:
        print(f'\nmemory at rest (Pss of the module processes, MiB): holder {rest[0]}, second {rest[1]}')


if __name__ == '__main__':
    sys.exit(main())

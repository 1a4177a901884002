//! The programs, and packets sent through them by the kernel's test run.

use std::{
    cell::{Ref, RefCell},
    collections::BTreeMap,
    io::ErrorKind,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::{Array, HashMap, LpmTrie, MapData, PerCpuArray, lpm_trie::Key},
    programs::{ProgramError, SchedClassifier, TestRun, TestRunOptions, TestRunResult},
};
use ebpf_abi::{EndpointList, PacketCounter, SocketAddress, Tracked, TrackedSet};
use ebpf_loader::patiently;

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;

/// More than any packet here grows to.
const OUT_BYTES: usize = 4_096;

/// A test run of many packets is tried again so often when a signal ends it (`EINTR`).
const RUNS_MAX: u32 = 100;

/// Each program is loaded when it is first asked for: the verifier takes longer than most tests.
pub(crate) struct Machine {
    pub(crate) ebpf: RefCell<Ebpf>,
    next_list: u64,
}

/// What a program did with a packet.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Ran {
    pub(crate) verdict: Verdict,
    pub(crate) packet: Vec<u8>,
}

#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub(crate) enum Verdict {
    /// On to the next program (`TC_ACT_UNSPEC`).
    Next,
    /// `TC_ACT_SHOT`.
    Dropped,
    /// Back out (`TC_ACT_REDIRECT`).
    Returned,
}

impl Machine {
    pub(crate) fn new() -> Self {
        let ebpf = EbpfLoader::new().load(ebpf_programs::SERVICES).unwrap();
        Self {
            ebpf: RefCell::new(ebpf),
            next_list: 0,
        }
    }

    pub(crate) fn map<K: Pod, V: Pod>(&mut self, name: &str) -> HashMap<&mut MapData, K, V> {
        self.ebpf
            .get_mut()
            .map_mut(name)
            .unwrap()
            .try_into()
            .unwrap()
    }

    /// Changes all flows that are remembered. Returns how many there are.
    pub(crate) fn change_flows(&mut self, mut change: impl FnMut(&mut Tracked)) -> usize {
        let map = self.ebpf.get_mut().map_mut("hf_tracked").unwrap();
        let mut sets: Array<&mut MapData, TrackedSet> = map.try_into().unwrap();
        let mut flows = 0;
        for number in 0..sets.len() {
            let mut set = sets.get(&number, 0).unwrap();
            let taken = set.tags.iter().zip(&mut set.flows);
            let taken = taken.filter(|(tag, _)| **tag != 0);
            let changed = taken.map(|(_, flow)| change(flow)).count();
            if changed != 0 {
                sets.set(number, set, 0).unwrap();
            }
            flows += changed;
        }
        flows
    }

    /// By TCP and by UDP.
    pub(crate) fn serve(&mut self, service: SocketAddr, endpoints: &[SocketAddr]) {
        self.serve_as(service, endpoints, |list| list);
    }

    pub(crate) fn serve_as(
        &mut self,
        service: SocketAddr,
        endpoints: &[SocketAddr],
        kind: fn(EndpointList) -> EndpointList,
    ) {
        for protocol in [TCP, UDP] {
            let key = |addr: SocketAddr| SocketAddress::new(addr.ip(), addr.port(), protocol);
            let endpoints: Vec<_> = endpoints.iter().copied().map(key).collect();
            self.write_list(key(service), &endpoints, kind);
        }
    }

    /// For clients from outside alone, and of them, if that is said, for those of these addresses alone.
    pub(crate) fn serve_outside(
        &mut self,
        service: SocketAddr,
        endpoints: &[SocketAddr],
        only: Option<&[IpAddr]>,
    ) {
        for protocol in [TCP, UDP] {
            let key = |addr: SocketAddr| SocketAddress::new(addr.ip(), addr.port(), protocol);
            let endpoints: Vec<_> = endpoints.iter().copied().map(key).collect();
            let kind = only.map_or((|list| list) as fn(_) -> _, |_| EndpointList::with_ranges);
            let list = self.write_list(key(service).for_outside(), &endpoints, kind);
            for &client in only.into_iter().flatten() {
                let data = list.range(SocketAddress::new(client, 0, 0).ip);
                let found = self.ebpf.get_mut().map_mut("hf_ranges").unwrap();
                let mut ranges: LpmTrie<_, [u32; 6], u32> = found.try_into().unwrap();
                ranges.insert(&Key::new(192, data), 1, 0).unwrap();
            }
        }
    }

    fn write_list(
        &mut self,
        service: SocketAddress,
        endpoints: &[SocketAddress],
        kind: fn(EndpointList) -> EndpointList,
    ) -> EndpointList {
        let list = kind(EndpointList::new(self.next_list, endpoints.len()));
        self.next_list += 1;
        for (slot, &endpoint) in list.slots().zip(endpoints) {
            let mut map = self.map::<u64, SocketAddress>("hf_endpoints");
            map.insert(slot, endpoint, 0).unwrap();
        }
        let mut frontends = self.map::<SocketAddress, u64>("hf_frontends");
        frontends.insert(service, list.value(), 0).unwrap();
        list
    }

    pub(crate) fn program(&self, name: &str) -> Ref<'_, SchedClassifier> {
        let mut ebpf = self.ebpf.borrow_mut();
        let program: &mut SchedClassifier = ebpf.program_mut(name).unwrap().try_into().unwrap();
        if program.fd().is_err() {
            let loaded = patiently(|| program.load());
            loaded.unwrap_or_else(|error| panic!("{name}: {error}\n{error:?}"));
        }
        drop(ebpf);
        Ref::map(self.ebpf.borrow(), |ebpf| {
            ebpf.program(name).unwrap().try_into().unwrap()
        })
    }

    /// In by the client's interface.
    #[track_caller]
    pub(crate) fn request(&self, packet: &[u8]) -> Ran {
        self.run("hf_requests", packet)
    }

    /// Out by the client's interface.
    #[track_caller]
    pub(crate) fn answer(&self, packet: &[u8]) -> Ran {
        self.run("hf_answers_out", packet)
    }

    #[track_caller]
    pub(crate) fn run(&self, name: &str, packet: &[u8]) -> Ran {
        let mut out = vec![0; OUT_BYTES];
        let options = TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            ..TestRunOptions::new()
        };
        let ran = self.program(name).test_run(options).unwrap();
        out.truncate(usize::try_from(ran.data_size_out).unwrap());
        let verdict = match ran.return_value.cast_signed() {
            -1 => Verdict::Next,
            2 => Verdict::Dropped,
            7 => Verdict::Returned,
            other => panic!("{name} returned {other}"),
        };
        Ran {
            verdict,
            packet: out,
        }
    }

    /// For each of so many in a row, or of more.
    pub(crate) fn cost(&self, name: &str, packet: &[u8], times: u32) -> Duration {
        let program = self.program(name);
        uninterrupted(|| {
            program.test_run(TestRunOptions {
                data_in: Some(packet),
                repeat: times,
                ..TestRunOptions::new()
            })
        })
        .duration
    }

    /// What was counted, without what was not.
    pub(crate) fn counted(&self) -> BTreeMap<PacketCounter, u64> {
        let ebpf = self.ebpf.borrow();
        let map = ebpf.map("hf_pkt_counters").unwrap();
        let counters: PerCpuArray<&MapData, u64> = map.try_into().unwrap();
        let sum = |&counter: &PacketCounter| {
            let per_cpu = counters.get(&(counter as u32), 0).unwrap();
            (counter, per_cpu.iter().sum())
        };
        let all = PacketCounter::ALL.iter().map(sum);
        all.filter(|&(_, count)| count > 0).collect()
    }
}

/// A test run of many packets, from the beginning where a signal ended it: what it had done by then stays done.
pub(crate) fn uninterrupted(
    mut run: impl FnMut() -> Result<TestRunResult, ProgramError>,
) -> TestRunResult {
    let mut again = 1..RUNS_MAX;
    loop {
        match run() {
            Err(ProgramError::SyscallError(error))
                if error.io_error.kind() == ErrorKind::Interrupted && again.next().is_some() => {}
            ran => return ran.unwrap(),
        }
    }
}

/// On to the next program, as `packet`.
pub(crate) fn next(packet: Vec<u8>) -> Ran {
    Ran {
        verdict: Verdict::Next,
        packet,
    }
}

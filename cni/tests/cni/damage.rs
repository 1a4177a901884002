//! Bad days: many at once, killed at any point, a full disk, files that say nothing.

use std::{
    collections::BTreeSet,
    fs,
    io::Write as _,
    net::IpAddr,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use mesh_api::cni::attachments_dir;
use rand::{RngExt as _, SeedableRng as _, prelude::IndexedRandom as _, rngs::StdRng};
use serde_json::{Value, json};

use crate::harness::{Machine, Pod, addresses, inside, plugin, run};

/// As the number that the project promises has it.
const AT_ONCE: usize = 50;

#[test]
fn fifty_pods_at_once_all_work_and_share_nothing() -> Result<()> {
    let machine = Machine::new()?;
    let pods = (0..AT_ONCE).map(|number| Pod::new(&format!("c{number}")));
    let pods = pods.collect::<Result<Vec<_>>>()?;
    let config = machine.config();
    let mut results: Vec<Value> = Vec::new();
    let mut took: Vec<Duration> = Vec::new();
    thread::scope(|scope| -> Result<()> {
        let adds: Vec<_> = pods
            .iter()
            .map(|pod| {
                let (machine, config) = (&machine, &config);
                scope.spawn(move || {
                    let start = Instant::now();
                    let answer = machine.call("ADD", pod, config);
                    (answer, start.elapsed())
                })
            })
            .collect();
        for add in adds {
            let (answer, time) = add.join().unwrap();
            results.push(answer?.done());
            took.push(time);
        }
        Ok(())
    })?;
    took.sort();
    eprintln!(
        "{AT_ONCE} ADDs at once: median {:?}, slowest {:?}",
        took[AT_ONCE / 2],
        took[AT_ONCE - 1]
    );
    let all: Vec<IpAddr> = results.iter().flat_map(addresses).collect();
    assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), 2 * AT_ONCE);
    for (pod, result) in pods.iter().zip(&results) {
        machine.reaches(pod, result)?;
    }
    assert_eq!(machine.attachments()?.len(), AT_ONCE);
    thread::scope(|scope| {
        let (machine, config) = (&machine, &config);
        let dels: Vec<_> = pods
            .iter()
            .map(|pod| scope.spawn(move || machine.call("DEL", pod, config)))
            .collect();
        for del in dels {
            del.join().unwrap().unwrap().done();
        }
    });
    assert!(machine.ports()?.is_empty());
    assert!(machine.attachments()?.is_empty());
    Ok(())
}

/// Enough that each step of ADD and DEL is cut some times.
const KILLS: usize = 300;

/// Of GC, with some pods to go each time.
const GC_KILLS: usize = 60;

#[test]
fn killed_at_any_point_nothing_is_given_twice_and_nothing_leaks() -> Result<()> {
    let machine = Machine::new()?;
    machine.set_ranges(Some("10.77.0.0/27"), Some("fd77::/64"))?;
    let config = machine.config();
    // What one takes here and now says where to cut; it follows how many were cut, to about a half.
    let first = Pod::new("first")?;
    let start = Instant::now();
    machine.call("ADD", &first, &config)?.done();
    let mut span = start.elapsed();
    let seed = 4;
    let mut random = StdRng::seed_from_u64(seed);
    let mut live = vec![first];
    let mut killed = 0;
    for turn in 0..KILLS {
        let verb = ["ADD", "ADD", "DEL", "GC"]
            .choose(&mut random)
            .copied()
            .unwrap_or("ADD");
        let after = span.mul_f64(random.random_range(0.0..1.3));
        match verb {
            "ADD" if live.len() < 12 => {
                let pod = Pod::new(&format!("c{turn}"))?;
                let is_cut = cut(machine.begin("ADD", &pod, &config)?, after)?;
                span = span.mul_f64(if is_cut { 1.1 } else { 0.9 });
                if is_cut {
                    killed += 1;
                    // A runtime cleans up, or tries again, or is killed itself.
                    match random.random_range(0..3) {
                        0 => drop(machine.call("DEL", &pod, &config)?.done()),
                        1 => {
                            let result = machine.call("ADD", &pod, &config)?.done();
                            machine.check(&pod, &result)?.done();
                            live.push(pod);
                        }
                        _ => {}
                    }
                } else {
                    live.push(pod);
                }
            }
            "GC" => {
                let listed: Vec<_> = live.iter().collect();
                machine.gc(&listed)?.done();
            }
            _ if live.len() > 1 => {
                let pod = live.swap_remove(random.random_range(0..live.len()));
                if cut(machine.begin("DEL", &pod, &config)?, after)? {
                    killed += 1;
                    machine.call("DEL", &pod, &config)?.done();
                }
            }
            _ => {}
        }
    }
    assert!(killed > KILLS / 10, "only {killed} were cut (seed {seed})");
    eprintln!("{killed} of {KILLS} were cut, within {span:?}");
    let listed: Vec<_> = live.iter().collect();
    machine.gc(&listed)?.done();
    let mut wanted: Vec<_> = live.iter().map(Pod::port).collect();
    wanted.sort();
    assert_eq!(machine.ports()?, wanted, "seed {seed}");
    let attachments = machine.attachments()?;
    assert_eq!(attachments.len(), live.len(), "seed {seed}");
    let held: Vec<_> = attachments
        .iter()
        .flat_map(|a| a.addresses.clone())
        .collect();
    assert_eq!(held.iter().collect::<BTreeSet<_>>().len(), 2 * live.len());
    for pod in &live {
        // The same result as before, and everything behind it is there.
        let result = machine.call("ADD", pod, &config)?.done();
        machine.check(pod, &result)?.done();
        machine.reaches(pod, &result)?;
    }
    // No address leaked: the range fills to its last one.
    let mut more = Vec::new();
    for number in live.len()..30 {
        let pod = Pod::new(&format!("more{number}"))?;
        machine.call("ADD", &pod, &config)?.done();
        more.push(pod);
    }
    let over = Pod::new("over")?;
    assert_eq!(machine.call("ADD", &over, &config)?.code(), 100);
    Ok(())
}

#[test]
fn garbage_collection_that_is_killed_at_any_point_is_ended_by_the_next_one_or_by_add() -> Result<()>
{
    const PODS: usize = 5;
    let machine = Machine::new()?;
    let config = machine.config_with("masquerade", json!(true));
    let seed = 5;
    let mut random = StdRng::seed_from_u64(seed);
    let pods = (0..PODS).map(|number| Pod::new(&format!("c{number}")));
    let pods = pods.collect::<Result<Vec<_>>>()?;
    let start = Instant::now();
    machine.gc(&[])?.done();
    // With something to remove it takes longer; it follows how many were cut.
    let mut span = 3 * start.elapsed();
    let mut cuts = 0;
    for turn in 0..GC_KILLS {
        for pod in &pods {
            machine.call("ADD", pod, &config)?.done();
        }
        let (mut kept, gone): (Vec<&Pod>, Vec<&Pod>) =
            pods.iter().partition(|_| random.random_range(0..3) == 0);
        let after = span.mul_f64(random.random_range(0.0..1.3));
        let is_cut = cut(machine.begin_gc(&kept)?, after)?;
        span = span.mul_f64(if is_cut { 1.05 } else { 0.95 });
        cuts += usize::from(is_cut);
        // The runtime asks again; or it is asked for a pod that was to go.
        if random.random_range(0..2) == 0
            && let Some(back) = gone.choose(&mut random)
        {
            machine.call("ADD", back, &config)?.done();
            kept.push(back);
        }
        machine.gc(&kept)?.done();
        let mut wanted: Vec<_> = kept.iter().map(|pod| pod.port()).collect();
        wanted.sort();
        assert_eq!(machine.ports()?, wanted, "seed {seed}, turn {turn}");
        let attachments = machine.attachments()?;
        assert_eq!(attachments.len(), kept.len(), "seed {seed}, turn {turn}");
        let held = attachments.iter().flat_map(|one| &one.addresses);
        assert_eq!(held.collect::<BTreeSet<_>>().len(), 2 * kept.len());
        let files = fs::read_dir(attachments_dir(machine.state_dir())?)?.count();
        assert_eq!(files, kept.len(), "seed {seed}, turn {turn}");
        for pod in kept {
            let result = machine.call("ADD", pod, &config)?.done();
            machine.check(pod, &result)?.done();
            machine.reaches(pod, &result)?;
        }
    }
    eprintln!("{cuts} of {GC_KILLS} were cut, within {span:?}");
    assert!(cuts > GC_KILLS / 5, "only {cuts} were cut (seed {seed})");
    machine.gc(&[])?.done();
    assert!(machine.ports()?.is_empty() && machine.attachments()?.is_empty());
    let tables = inside(&machine.namespace, || run("nft", &["list", "tables"]))?;
    assert!(tables.is_empty(), "{tables}");
    Ok(())
}

/// Kills the plug-in after a while, with no chance to clean up; `false` if it was done before, and well.
fn cut(mut child: Child, after: Duration) -> Result<bool> {
    thread::sleep(after);
    child.kill()?;
    let status = child.wait()?;
    ensure!(
        status.success() || status.code().is_none(),
        "it failed by itself: {status}"
    );
    Ok(!status.success())
}

#[test]
fn a_full_disk_is_told_leaves_nothing_and_lets_pods_go() -> Result<()> {
    let machine = Machine::new()?;
    let disk = SmallDisk::mount(machine.state_dir())?;
    let fill = disk.path("fill");
    let one = Pod::new("one")?;
    let environment = |verb: &str, pod: &Pod| -> Vec<(String, String)> {
        let pairs = [
            ("CNI_COMMAND", verb),
            ("CNI_CONTAINERID", &pod.container),
            ("CNI_IFNAME", "eth0"),
            ("CNI_NETNS", &pod.path()),
        ];
        pairs
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .to_vec()
    };
    let mut config = machine.config();
    config["stateDir"] = disk.path("cni").into();
    fs::create_dir(disk.path("cni"))?;
    fs::copy(
        machine.state_dir().join("network.json"),
        format!("{}/network.json", disk.path("cni")),
    )?;
    let call = |verb: &str, pod: &Pod| machine.execute(&plugin(), &environment(verb, pod), &config);
    let result = call("ADD", &one)?.done();
    // Everything that is left goes into one file.
    let mut file = fs::File::create(&fill)?;
    while file.write_all(&[0; 512]).is_ok() {}
    let two = Pod::new("two")?;
    let answer = call("ADD", &two)?;
    assert_eq!(answer.code(), 5, "{}", answer.out);
    let status = machine.execute(
        &plugin(),
        &[("CNI_COMMAND".to_owned(), "STATUS".to_owned())],
        &config,
    )?;
    assert_eq!(status.code(), 51);
    assert_eq!(machine.ports()?, [one.port()]);
    assert!(two.ip("link show eth0").is_err());
    machine.reaches(&one, &result)?;
    call("DEL", &one)?.done();
    assert!(machine.ports()?.is_empty());
    drop(file);
    fs::remove_file(&fill)?;
    let result = call("ADD", &two)?.done();
    machine.reaches(&two, &result)
}

/// A file system of some kilobytes, in a mount namespace that ends with the process in it.
struct SmallDisk {
    holder: Child,
    mount: String,
}

impl SmallDisk {
    fn mount(below: &std::path::Path) -> Result<Self> {
        let folder = below.join("disk");
        fs::create_dir(&folder)?;
        let folder = folder.display().to_string();
        // Waits for the end of its input, which comes with the end of the test at the latest.
        let script = "mount -t tmpfs -o size=64k none \"$0\" && echo ready && cat";
        let mut holder = Command::new("unshare")
            .args(["--mount", "sh", "-c", script, &folder])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        let out = holder.stdout.as_mut().context("no output")?;
        std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line)?;
        ensure!(line == "ready\n", "no small disk: {line:?}");
        let mount = format!("/proc/{}/root{folder}", holder.id());
        Ok(Self { holder, mount })
    }

    fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.mount)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        self.holder.kill().ok();
        self.holder.wait().ok();
    }
}

#[test]
fn cut_and_garbled_records_never_free_an_address_that_is_used() -> Result<()> {
    let machine = Machine::new()?;
    machine.set_ranges(Some("10.77.0.0/29"), None)?; // Six addresses: a mistake shows soon.
    let config = machine.config();
    let pod = Pod::new("victim")?;
    let result = machine.call("ADD", &pod, &config)?.done();
    let record = machine.record(&pod)?;
    let whole = fs::read(&record)?;
    let mut damages: Vec<Vec<u8>> = (0..whole.len())
        .step_by(37)
        .map(|length| whole[..length].to_vec())
        .collect();
    damages.push(vec![0; whole.len()]);
    damages.push(b"{\"id\":7}".to_vec());
    for damage in damages {
        fs::write(&record, &damage)?;
        for number in 0..6 {
            let other = Pod::new(&format!("o{number}"))?;
            let answer = machine.call("ADD", &other, &config)?.done();
            assert_ne!(addresses(&answer), addresses(&result));
            machine.call("DEL", &other, &config)?.done();
        }
        machine.reaches(&pod, &result)?;
        let mended = machine.call("ADD", &pod, &config)?.done();
        assert_eq!(mended, result);
        machine.check(&pod, &result)?.done();
    }
    // Even with the whole folder gone: the kernel still says who has what.
    fs::remove_dir_all(attachments_dir(machine.state_dir())?)?;
    for number in 0..5 {
        let other = Pod::new(&format!("p{number}"))?;
        let answer = machine.call("ADD", &other, &config)?.done();
        assert_ne!(addresses(&answer), addresses(&result));
        machine.call("DEL", &other, &config)?.done();
    }
    Ok(())
}

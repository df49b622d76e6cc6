//! The whole program as processes: a cluster is made, entered, configured; daemons and `keep` are killed and found again.
use super::lab::{Host, kill, until};
use vmtwin::config::Cluster;

#[test]
fn a_cluster_is_made_with_one_time_tokens_and_configured_on_all_nodes_or_none() {
    let folder = tempfile::Builder::new().prefix("vmt").tempdir().unwrap();
    let (mut h1, mut h2) = (Host::new(folder.path(), "h1"), Host::new(folder.path(), "h2"));
    let mut w1 = Host::new(folder.path(), "w1");
    h1.refused("status", 4, "no contact with the daemon");
    h1.start("node");
    h2.start("node");
    until("the daemons to answer", || (h1.run("status").code == 0 && h2.run("status").code == 0).then_some(()));
    assert!(h1.ok("status").contains("no modules"));
    h1.refused("start db", 3, "no cluster yet");

    let init = format!("cluster init --name lab --node h1 --address {} --witness w1={}", h1.address, w1.address);
    h1.refused(&format!("{init} --replication-address {}", h1.address), 2, "stands here twice");
    h1.ok(&init);
    h1.refused(&init, 3, "in a cluster already");

    let token = h1.ok("cluster token").trim().to_owned();
    let join =
        |token: &str, host: &Host| format!("cluster join {token} --node {} --address {}", host.name, host.address);
    let wrong = format!("{}{}", &token[..token.len() - 4], if token.ends_with("AAAA") { "BBBB" } else { "AAAA" });
    h2.refused(&join("rubbish", &h2), 2, "token");
    until("the first node to listen", || (h2.run(&join(&wrong, &h2)).code == 6).then_some(()));
    h2.refused(&join(&wrong, &h2), 6, "token");
    assert!(!h2.paths.tls().exists() && !h2.paths.cluster_xml().exists(), "a join that failed left something");
    h2.ok(&join(&token, &h2));
    h2.refused(&join(&token, &h2), 3, "in a cluster already");
    let state = folder.path().join("w1").display().to_string();
    let join_witness = |token: &str, name: &str| format!("cluster join {token} --witness {name} --state {state}");
    w1.refused(&join_witness(&token, "w1"), 6, "used already");
    let stranger = h1.ok("cluster token").trim().to_owned();
    w1.refused(&join_witness(&stranger, "w9"), 3, "has the witness w1");
    let token = h1.ok("cluster token").trim().to_owned();
    w1.ok(&join_witness(&token, "w1"));
    assert!(!w1.paths.tls().join("ca.key").exists(), "a witness can sign nobody");
    w1.start(&format!("witness --state {state}"));

    let joined = Cluster::load(&h1.paths).unwrap();
    assert_eq!((joined.version, joined.nodes.len()), (2, 2));
    assert_eq!(Cluster::load(&h2.paths).unwrap(), joined);
    until("all members to answer", || {
        let all = [&h1, &h2].map(|host| host.run("cluster status").out);
        all.iter().all(|text| text.matches("answers").count() == 3 && !text.contains(": ")).then_some(())
    });

    // A configuration with an unknown element, and a good one.
    let file = folder.path().join("new.xml");
    let apply = format!("apply {}", file.display());
    let text = std::fs::read_to_string(h1.paths.cluster_xml()).unwrap();
    std::fs::write(&file, text.replace("</cluster>", "<surprise/></cluster>")).unwrap();
    h1.refused(&apply, 2, "<surprise>");
    std::fs::write(&file, text.replace(&w1.address.to_string(), "127.9.9.9")).unwrap();
    assert!(h2.ok(&apply).contains("version 3"));
    let changed = Cluster::load(&h1.paths).unwrap();
    assert_eq!((changed.version, changed.witness.address.to_string()), (3, "127.9.9.9".to_owned()));
    assert_eq!(Cluster::load(&h2.paths).unwrap(), changed);
    std::fs::write(&file, &text).unwrap();
    h2.kill();
    h1.refused(&apply, 3, "--force");
    assert_eq!(Cluster::load(&h1.paths).unwrap(), changed, "a refused apply changed something");
    assert!(h1.ok(&format!("{apply} --force")).contains("h2 has not got it"));
    assert_eq!(Cluster::load(&h1.paths).unwrap().version, 4);
    assert!(h1.ok("cluster status").contains("no contact with node h2"));

    h1.refused("status nosuch", 1, "nosuch");
    h1.refused("start nosuch", 1, "nosuch");
    h1.refused("protect db --peer h9", 2, "h9");
    h1.refused("unprotect nosuch", 1, "nosuch");
    h1.refused("log nosuch", 1, "nosuch");
}

#[test]
fn keep_outlives_the_daemon_and_a_dead_one_is_replaced() {
    let folder = tempfile::Builder::new().prefix("vmt").tempdir().unwrap();
    let mut h1 = Host::new(folder.path(), "h1");
    h1.start("node");
    let first = h1.pid(&h1.paths.keep_pid());
    h1.kill();
    assert_eq!(h1.pid(&h1.paths.keep_pid()), first, "keep died with its daemon");
    h1.start("node");
    until("the daemon", || (h1.run("status").code == 0).then_some(()));
    assert_eq!(h1.pid(&h1.paths.keep_pid()), first, "a second keep was started");
    let mut second = Host::new(folder.path(), "h1");
    second.start("node");
    until("a second daemon to give up", || second.output().contains("runs on this host already").then_some(()));
    assert_eq!(h1.run("status").code, 0, "the second daemon took the first one's socket");
    kill(first);
    let next = until("another keep", || Some(h1.pid(&h1.paths.keep_pid())).filter(|pid| *pid != first));
    assert_ne!(next, first);
}

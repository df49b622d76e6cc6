//! Files as an admin writes them, and the sentence for each that is wrong.
use super::*;
use std::path::Path;
use vmtwin_core::ids::NodeName;

const CLUSTER: &str = r#"<cluster name="paris" id="0000000000000000000000000000002a" version="3">
  <nodes>
    <node name="h1">
      <address>10.0.0.1</address>
      <address use="replication" tls="off">192.168.9.1</address>
    </node>
    <node name="h2">
      <address>10.0.0.2</address>
      <address use="replication">192.168.9.2</address>
    </node>
  </nodes>
  <arbitration type="witness">
    <witness name="w1" address="10.0.0.9"/>
  </arbitration>
</cluster>
"#;

const MODULE: &str = r#"<module name="db" template="kvm" id="0000000000000000000000000000002b" version="5">
  <vm name="db" onGuestShutdown="stop" stopTimeout="180"/>
  <nodes primary="h1" secondary="h2"/>
  <replication path="/var/lib/libvirt/images/db" slowPeer="3000"/>
</module>
"#;

fn cluster(text: &str) -> Result<Cluster, String> {
    Cluster::parse(text, Path::new("cluster.xml")).map_err(|e| e.to_string())
}

fn module(text: &str) -> Result<ModuleConfig, String> {
    ModuleConfig::parse(text, Path::new("db.xml")).map_err(|e| e.to_string())
}

#[test]
fn what_was_read_is_written_as_it_was() {
    assert_eq!(cluster(CLUSTER).unwrap().to_xml(), CLUSTER);
    assert_eq!(module(MODULE).unwrap().to_xml(), MODULE);
    let restart =
        MODULE.replace("\"stop\"", "\"restart\"").replace("<vm name=\"db\"", "<vm name=\"db\" driver=\"fake\"");
    assert_eq!(module(&restart).unwrap().to_xml(), restart);
}

#[test]
fn the_form_of_the_handbook_is_taken() {
    let text = r#"<?xml version="1.0"?>
<!-- as in DESIGN.md -->
<module name="db" template="kvm" id="2b" version="5">
  <vm name="db" onGuestShutdown="stop" stopTimeout="180"/>
  <nodes primary="h1" secondary="h2" failback="off"/>
  <replication path="/var/lib/libvirt/images/db" ack="written" slowPeer="3000" resyncRate="0"/>
</module>"#;
    assert_eq!(module(text), module(MODULE));
    let short = r#"<module name="db" id="2b" version="5"><vm/><nodes primary="h1" secondary="h2"/><replication path="/var/lib/libvirt/images/db"/></module>"#;
    assert_eq!(module(short), module(MODULE), "defaults are those of the handbook");
}

#[test]
fn links_take_addresses_for_replication_first() {
    let cluster = cluster(CLUSTER).unwrap();
    let h1 = cluster.node(&NodeName::new("h1").unwrap()).unwrap();
    let found: Vec<_> = h1.link_addresses().iter().map(|a| (a.ip.to_string(), a.tls)).collect();
    assert_eq!(found, [("192.168.9.1".to_owned(), false), ("10.0.0.1".to_owned(), true)]);
    assert_eq!(h1.address().to_string(), "10.0.0.1");
}

#[test]
fn a_wrong_cluster_file_is_refused_with_line_and_element() {
    let wrong = |from: &str, to: &str, sentence: &str| {
        assert!(CLUSTER.contains(from), "{from}");
        let found = cluster(&CLUSTER.replacen(from, to, 1)).expect_err(to);
        assert_eq!(found, format!("cluster.xml:{sentence}"));
    };
    wrong(
        r#"<witness name="w1""#,
        r#"<quorum/><witness name="w1""#,
        "13: <quorum>: this version does not know the element <quorum> here: remove it",
    );
    wrong(
        r#"<node name="h2">"#,
        r#"<node name="h2" rack="4">"#,
        "7: <node>: this version does not know the attribute \"rack\" here: remove it",
    );
    wrong(
        "10.0.0.2<",
        "h2.example<",
        "8: <address>: \"h2.example\" is no IP address (names are not resolved: they fail with the network)",
    );
    wrong("10.0.0.2<", "10.0.0.1<", "8: <address>: 10.0.0.1 stands here twice: each address belongs to one node");
    wrong("\"h2\"", "\"h1\"", "7: <node>: a second node named h1");
    wrong(" name=\"h2\"", "", "7: <node>: the attribute \"name\" is missing");
    wrong("\"w1\"", "\"h2\"", "13: <witness>: a node is named h2, too: choose another name");
    wrong(
        "<witness name=\"w1\" address=\"10.0.0.9\"/>",
        "",
        "12: <arbitration>: 0 witnesses: this version needs exactly one",
    );
    wrong(
        "<arbitration type=\"witness\">",
        "<arbitration type=\"ping\">",
        "12: <arbitration>: type=\"ping\" is not supported yet by this version: \"witness\" is",
    );
    wrong("<address>10.0.0.2</address>", "", "7: <node>: a node needs an <address> without use=\"replication\"");
    wrong(
        "<address>10.0.0.2",
        "<address tls=\"off\">10.0.0.2",
        "8: <address>: tls=\"off\" is for an address with use=\"replication\" only",
    );
    wrong("version=\"3\"", "version=\"x\"", "1: <cluster>: version=\"x\": invalid digit found in string");
    wrong("<cluster ", "<module ", "15: <cluster>: this is no XML: expected 'module' tag, not 'cluster' at 15:1");
    assert!(cluster("<other/>").unwrap_err().ends_with("<other>: the outermost element must be <cluster>"));
    assert!(cluster(&"x".repeat(300_000)).unwrap_err().contains("larger than"));
}

#[test]
fn a_wrong_module_file_is_refused_with_line_and_element() {
    let wrong = |from: &str, to: &str, sentence: &str| {
        assert!(MODULE.contains(from), "{from}");
        let found = module(&MODULE.replacen(from, to, 1)).expect_err(to);
        assert_eq!(found, format!("db.xml:{sentence}"));
    };
    wrong("secondary=\"h2\"", "secondary=\"h1\"", "3: <nodes>: primary and secondary are the same node");
    wrong(
        "secondary=\"h2\"",
        "secondary=\"h2\" failback=\"on\"",
        "3: <nodes>: failback=\"on\" is not supported yet by this version: leave it out or write \"off\"",
    );
    wrong(
        "</module>",
        "<check><tcp/></check></module>",
        "5: <check>: <check> is not supported yet by this version: remove it",
    );
    wrong(
        "</module>",
        "<failover on=\"true\"/></module>",
        "5: <failover>: <failover> is not supported yet by this version: remove it",
    );
    wrong(
        "slowPeer=\"3000\"",
        "slowPeer=\"10\"",
        "4: <replication>: slowPeer=\"10\": 1000 (a lease) to 60000 milliseconds",
    );
    wrong(
        "/var/lib/libvirt/images/db",
        "/var/lib/../db",
        "4: <replication>: path=\"/var/lib/../db\": an absolute path without \"..\", and not \"/\"",
    );
    wrong("<vm name=\"db\"", "<vm name=\"a/b\"", "2: <vm>: \"a/b\" is no name of a VM");
    wrong("<vm ", "<vm driver=\"xen\" ", "2: <vm>: driver=\"xen\": \"libvirt\", or leave it out");
    wrong(
        "name=\"db\" template",
        "name=\"node\" template",
        "1: <module>: node is a name that vmtwin uses itself: choose another",
    );
    wrong("<nodes primary=\"h1\" secondary=\"h2\"/>", "", "1: <module>: <nodes> is missing");
    for dir in ["/", "relative", "/etc/x", "/a\u{7}"] {
        assert!(module::check_dir(Path::new(dir)).is_err(), "{dir:?}");
    }
}

#[test]
fn files_of_this_host_are_stored_whole_and_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let paths = Paths::under(folder.path());
    paths.create().unwrap();
    assert!(matches!(Cluster::load(&paths), Err(ConfigError::Read { .. })));
    assert_eq!(paths.list_modules().unwrap(), []);
    let (cluster, module) = (cluster(CLUSTER).unwrap(), module(MODULE).unwrap());
    cluster.store(&paths).unwrap();
    module.store(&paths).unwrap();
    assert_eq!(Cluster::load(&paths).unwrap(), cluster);
    assert_eq!(paths.list_modules().unwrap(), std::slice::from_ref(&module.name));
    assert_eq!(ModuleConfig::load(&paths, &module.name).unwrap(), module);
    assert!(!paths.etc.join("cluster.xml.new").exists());
    let other = "web".parse().unwrap();
    std::fs::create_dir_all(paths.modules().join("web")).unwrap();
    std::fs::write(paths.userconfig(&other), MODULE).unwrap();
    let found = ModuleConfig::load(&paths, &other).unwrap_err().to_string();
    assert!(found.ends_with("userconfig.xml:1: <module>: name=\"db\" in the folder of module web"), "{found}");
}

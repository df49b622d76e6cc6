//! Handshakes in memory: who is believed, who is not.
use super::*;
use crate::config::Cluster;
use crate::testing::TestCluster;
use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection};
use std::sync::Arc;

#[test]
fn members_of_one_cluster_believe_each_other_and_learn_their_names() {
    let cluster = TestCluster::new("paris");
    let (h1, h2, w1) = (cluster.host("h1"), cluster.host("h2"), cluster.host("w1"));
    let (client, server) =
        handshake(client_config(&h1, "h2").unwrap(), server_config(&h2).unwrap()).expect("both are members");
    assert_eq!(Identity::of_peer(client.peer_certificates()).unwrap().name, "h2");
    assert_eq!(Identity::of_peer(server.peer_certificates()).unwrap().to_string(), "vmtwin://paris/h1");
    assert_eq!(server.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    handshake(client_config(&h1, "w1").unwrap(), witness_server_config(&w1).unwrap()).expect("a witness is a member");
    assert_eq!(own_identity(&w1).unwrap().name, "w1");
}

#[test]
fn a_certificate_of_another_cluster_is_refused_on_both_sides_even_with_the_same_names() {
    let (ours, theirs) = (TestCluster::new("paris"), TestCluster::new("paris"));
    let (h1, stranger) = (ours.host("h1"), theirs.host("h2"));
    handshake(client_config(&stranger, "h1").unwrap(), server_config(&h1).unwrap()).expect_err("another authority");
    handshake(client_config(&h1, "h2").unwrap(), server_config(&stranger).unwrap()).expect_err("another authority");
    // The server alone, by a client that would believe it: the server must do the refusing.
    let trusting = join_client_config(&Authority::own_fingerprint(&h1).unwrap()).unwrap();
    handshake(trusting.clone(), server_config(&h1).unwrap()).expect_err("no certificate shown");
    handshake(trusting, witness_server_config(&h1).unwrap()).expect_err("no certificate shown");
}

#[test]
fn a_name_that_cluster_xml_does_not_have_is_refused_from_the_next_handshake_on() {
    let cluster = TestCluster::new("paris");
    let (h1, h2, h9) = (cluster.host("h1"), cluster.host("h2"), cluster.host("h9"));
    let server = server_config(&h1).unwrap();
    handshake(client_config(&h9, "h1").unwrap(), server.clone()).expect_err("h9 is signed and not named");
    handshake(client_config(&h2, "h1").unwrap(), server.clone()).expect("h2 is named");
    let mut without = Cluster::load(&h1).unwrap();
    without.nodes.retain(|n| n.name.as_str() != "h2");
    without.store(&h1).unwrap();
    handshake(client_config(&h2, "h1").unwrap(), server).expect_err("h2 was taken out");
}

#[test]
fn a_witness_may_be_asked_and_may_not_ask() {
    let cluster = TestCluster::new("paris");
    let (h1, w1) = (cluster.host("h1"), cluster.host("w1"));
    handshake(client_config(&h1, "w1").unwrap(), witness_server_config(&w1).unwrap()).expect("it is asked");
    handshake(client_config(&w1, "h1").unwrap(), server_config(&h1).unwrap()).expect_err("it asks");
    handshake(client_config(&w1, "h1").unwrap(), api_server_config(&h1).unwrap()).expect_err("it asks");
}

#[test]
fn a_client_that_means_one_node_does_not_take_another() {
    let cluster = TestCluster::new("paris");
    let (h1, h2) = (cluster.host("h1"), cluster.host("h2"));
    handshake(client_config(&h1, "w1").unwrap(), server_config(&h2).unwrap()).expect_err("h2 is not w1");
}

#[test]
fn the_api_lets_a_stranger_in_without_a_name_and_not_with_a_wrong_one() {
    let (ours, theirs) = (TestCluster::new("paris"), TestCluster::new("rome"));
    let h1 = ours.host("h1");
    let joining = join_client_config(&Authority::own_fingerprint(&h1).unwrap()).unwrap();
    let (_, server) = handshake(joining, api_server_config(&h1).unwrap()).expect("it may join");
    assert_eq!(Identity::of_peer(server.peer_certificates()), None);
    let stranger = theirs.host("h1");
    handshake(client_config(&stranger, "h1").unwrap(), api_server_config(&h1).unwrap()).expect_err("another cluster");
    let wrong = join_client_config(&Authority::own_fingerprint(&stranger).unwrap()).unwrap();
    handshake(wrong, api_server_config(&h1).unwrap()).expect_err("the token names another authority");
}

#[test]
fn a_request_gets_the_name_that_the_authority_gives_whatever_it_asks_for() {
    let authority = Authority::create("paris").unwrap();
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let mut asked = rcgen::CertificateParams::default();
    asked.subject_alt_names = vec![rcgen::SanType::URI("vmtwin://paris/h1".try_into().unwrap())];
    let request = asked.serialize_request(&key).unwrap().pem().unwrap();
    let identity = Identity { cluster: "paris".into(), name: "h7".into() };
    let signed = authority.sign(&request, &identity).unwrap();
    let signed = CertificateDer::from_pem_slice(signed.as_bytes()).unwrap();
    assert_eq!(Identity::of(&signed), Some(identity));
    assert!(authority.sign("no request", &Identity { cluster: "paris".into(), name: "h7".into() }).is_err());
}

#[test]
fn a_token_is_good_once_and_for_an_hour() {
    let cluster = TestCluster::new("paris");
    let h1 = cluster.host("h1");
    let give = || Token::give(&h1, "10.0.0.1".parse().unwrap(), 1000).unwrap();
    let token = give();
    let read: Token = token.to_string().parse().unwrap();
    assert!(read == token);
    assert_eq!(Token::take(&h1, &token.secret, 1000 + TOKEN_SECONDS), Ok(()));
    assert_eq!(Token::take(&h1, &token.secret, 1000), Err(TokenRefused::Unknown), "used");
    let late = give();
    assert_eq!(Token::take(&h1, &late.secret, 1001 + TOKEN_SECONDS), Err(TokenRefused::Expired));
    assert_eq!(Token::take(&h1, &late.secret, 1000), Err(TokenRefused::Unknown), "a late use is a use");
    assert_eq!(Token::take(&h1, &"0".repeat(32), 1000), Err(TokenRefused::Unknown), "wrong");
    assert_eq!(Token::take(&h1, "../../etc/passwd", 1000), Err(TokenRefused::Unknown));
    let text = give().to_string();
    for bad in ["", "vmtwin1", &text[..text.len() - 1], &text.replace("vmtwin1", "vmtwin2"), &format!("{text}_x")] {
        assert_eq!(bad.parse::<Token>().err(), Some(TokenRefused::Form), "{bad:?}");
    }
}

#[test]
fn keys_are_for_root_alone() {
    use std::os::unix::fs::PermissionsExt;
    let cluster = TestCluster::new("paris");
    let tls = cluster.host("h1").tls();
    for name in ["node.key", "ca.key", "node.pem"] {
        assert_eq!(std::fs::metadata(tls.join(name)).unwrap().permissions().mode() & 0o777, 0o600, "{name}");
    }
    assert_eq!(std::fs::metadata(&tls).unwrap().permissions().mode() & 0o777, 0o700);
}

/// Runs a handshake to its end, in memory.
fn handshake(
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
) -> Result<(ClientConnection, ServerConnection), rustls::Error> {
    let mut client = ClientConnection::new(client, server_name()).unwrap();
    let mut server = ServerConnection::new(server).unwrap();
    for _ in 0..8 {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).unwrap();
        }
        let mut rest = &wire[..];
        while !rest.is_empty() {
            server.read_tls(&mut rest).unwrap();
            server.process_new_packets()?;
        }
        let mut wire = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut wire).unwrap();
        }
        let mut rest = &wire[..];
        while !rest.is_empty() {
            client.read_tls(&mut rest).unwrap();
            client.process_new_packets()?;
        }
    }
    assert!(!client.is_handshaking() && !server.is_handshaking());
    Ok((client, server))
}

//! Connections at port 7721 reach the module that they name, untouched, or are closed.
use super::pass::Inbox;
use super::*;
use crate::testing::TestCluster;
use std::time::Duration;
use tokio::io::AsyncWriteExt;

const LONG: Duration = Duration::from_secs(120);

#[tokio::test]
async fn a_connection_reaches_its_module_with_the_first_byte_after_the_preamble() {
    let cluster = TestCluster::new("paris");
    let h1 = cluster.host("h1");
    let keep = tokio::spawn(run(h1.clone()));
    let address = SocketAddr::new(cluster.address("h1"), PORT_LINK);
    let db = "db".parse().unwrap();

    // Nobody takes it yet: closed, and nothing of it is left over.
    let mut early = connect(address).await;
    early.write_all(&Preamble::Module("db".parse().unwrap()).encode()).await.unwrap();
    assert_eq!(timeout(LONG, early.read(&mut [0])).await.unwrap().unwrap_or(0), 0);
    // Noise: closed.
    let mut noise = connect(address).await;
    noise.write_all(&[b'G'; PREAMBLE_BYTES]).await.unwrap();
    assert_eq!(timeout(LONG, noise.read(&mut [0])).await.unwrap().unwrap_or(0), 0);

    let inbox = Inbox::bind(&h1.module_link(&db)).unwrap();
    let mut peer = connect(address).await;
    let mut words = Preamble::Module(db).encode().to_vec();
    words.extend(b"hello");
    peer.write_all(&words).await.unwrap();
    let (socket, from) = timeout(LONG, inbox.next()).await.unwrap().unwrap();
    assert_eq!(from, peer.local_addr().unwrap().to_string());
    let mut socket = TcpStream::from_std(socket).unwrap();
    let mut heard = [0; 5];
    timeout(LONG, socket.read_exact(&mut heard)).await.unwrap().unwrap();
    assert_eq!(&heard, b"hello");
    socket.write_all(b"back").await.unwrap();
    let mut heard = [0; 4];
    timeout(LONG, peer.read_exact(&mut heard)).await.unwrap().unwrap();
    assert_eq!(&heard, b"back");
    keep.abort();
}

#[test]
fn one_source_cannot_take_all_places() {
    let door = Arc::new(Door::default());
    let (loud, quiet) = ("10.0.0.66".parse().unwrap(), "10.0.0.2".parse().unwrap());
    let mut places: Vec<Place> = std::iter::from_fn(|| door.enter(loud)).collect();
    assert!(!places.is_empty() && places.len() < 100);
    assert!(door.enter(quiet).is_some());
    places.pop();
    assert!(door.enter(loud).is_some(), "a place that is left is free again");
}

/// Listening may still be on its way.
async fn connect(address: SocketAddr) -> TcpStream {
    let connect = async {
        loop {
            match TcpStream::connect(address).await {
                Ok(stream) => return stream,
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    };
    timeout(LONG, connect).await.expect("keep listens")
}

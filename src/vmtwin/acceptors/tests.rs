//! Votes over real sockets: kept over a restart, lost only as a new voter, refused to strangers.
use super::wire::{Ask, Call, Reply};
use super::*;
use crate::testing::TestCluster;
use crate::{keep, witness};
use std::time::Duration;
use tokio::sync::mpsc::Receiver;
use tokio::task::JoinHandle;
use vmtwin_core::arbiter::message::{Accepted, AcceptorState, Answer, Ballot, Refusal, Reply as Core, Request};
use vmtwin_core::ids::{AcceptorId, ModuleId, RecordId, ReplicaId};
use vmtwin_core::record::Record;

const MODULE: ModuleId = ModuleId(0xdb);
const LONG: Duration = Duration::from_secs(120);

#[tokio::test]
async fn a_vote_survives_a_restart_and_a_lost_one_comes_back_as_another_voter() {
    let folder = tempfile::tempdir().unwrap();
    let open = || Voters::open(folder.path().join("votes")).unwrap();
    let voters = open();
    assert_eq!(voters.answer(MODULE, Ask::Who).await, Reply::Id(None));
    assert!(matches!(voters.answer(MODULE, read()).await, Reply::Refused(_)), "nobody votes who was not made");
    let Reply::Id(Some(id)) = voters.answer(MODULE, Ask::Make).await else { panic!("not made") };
    assert_eq!(voters.answer(MODULE, Ask::Make).await, Reply::Id(Some(id)), "made once");
    let record = Record::first(RecordId(1), ReplicaId(1), vec![id]);
    let ballot = Ballot { number: 5, node: id };
    let accept = Ask::Core(Request::Accept { ballot, record: record.clone() });
    assert_eq!(core(voters.answer(MODULE, accept).await).reply, Core::Accepted);

    let voters = open();
    let Core::State(state) = core(voters.answer(MODULE, read()).await).reply else { panic!("no state") };
    assert_eq!(state.accepted, Some(Accepted { ballot, record }));
    assert_eq!(voters.answer(MODULE, Ask::Who).await, Reply::Id(Some(id)));

    let file = folder.path().join("votes").join(MODULE.to_string());
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[40] ^= 1;
    std::fs::write(&file, &bytes).unwrap();
    let Reply::Refused(why) = open().answer(MODULE, Ask::Make).await else { panic!("a damaged file was replaced") };
    assert!(why.contains("damaged") && why.contains("remove it"), "{why}");

    std::fs::remove_file(&file).unwrap();
    let voters = open();
    assert_eq!(voters.answer(MODULE, Ask::Who).await, Reply::Id(None));
    let Reply::Id(Some(other)) = voters.answer(MODULE, Ask::Make).await else { panic!("not made") };
    assert_ne!(id, other);
    assert_eq!(voters.answer(MODULE, Ask::Forget).await, Reply::Id(None));
    assert!(!file.exists());
}

#[tokio::test]
async fn a_vote_that_cannot_be_stored_is_not_given_and_counts_as_never_heard() {
    let folder = tempfile::tempdir().unwrap();
    let votes = folder.path().join("votes");
    let voters = Voters::open(votes.clone()).unwrap();
    let Reply::Id(Some(id)) = voters.answer(MODULE, Ask::Make).await else { panic!("not made") };
    // In the way of the file that is written beside.
    let in_the_way = votes.join(format!("{MODULE}.new"));
    std::fs::create_dir(&in_the_way).unwrap();
    let prepare = || Ask::Core(Request::Prepare { ballot: Ballot { number: 7, node: id }, by: ReplicaId(1) });
    assert!(matches!(voters.answer(MODULE, prepare()).await, Reply::Refused(_)));
    std::fs::remove_dir(&in_the_way).unwrap();
    let state = state(core(voters.answer(MODULE, read()).await));
    assert_eq!(state.promised, Ballot::default(), "it goes on from what is on disk");
    assert!(matches!(core(voters.answer(MODULE, prepare()).await).reply, Core::Promised { .. }));
}

#[tokio::test]
async fn three_voters_are_asked_over_their_own_ways_and_found_again_after_a_restart() {
    let cluster = TestCluster::new("paris");
    let (h1, h2, w1) = (cluster.host("h1"), cluster.host("h2"), cluster.host("w1"));
    let _keep1 = Task(tokio::spawn(keep::run(h1.clone())));
    let _keep2 = Task(tokio::spawn(keep::run(h2.clone())));
    let first_witness = Task(tokio::spawn(witness::run(w1.clone(), None)));
    let places = places(&h1, &cluster.cluster, &"h1".parse().unwrap(), &"h2".parse().unwrap());
    let mut made = Vec::new();
    for place in &places {
        made.push(make(&h1, place).await);
    }
    let (acceptors, mut news) = Acceptors::connect(&h1, places, MODULE);
    for _ in 0..3 {
        let up = until(&mut news, |n| matches!(n, News::Up { id: Some(_), .. })).await;
        let News::Up { place, id } = up else { unreachable!() };
        assert_eq!(id, Some(made[place]));
    }
    assert_eq!(acceptors.ids(), made.iter().copied().map(Some).collect::<Vec<_>>());
    for (place, id) in made.iter().enumerate() {
        let nonce = 100 + place as u64;
        assert!(acceptors.ask(*id, nonce, Request::Read { candidate: None }));
        let answer = until(&mut news, |n| matches!(n, News::Answer { nonce: n, .. } if *n == nonce)).await;
        let News::Answer { answer, place: from, .. } = answer else { unreachable!() };
        assert_eq!((answer.acceptor, from), (*id, place));
    }
    assert!(!acceptors.ask(AcceptorId(1), 1, Request::Read { candidate: None }), "nobody of that id");

    drop(first_witness);
    until(&mut news, |n| matches!(n, News::Down { place: 2, .. })).await;
    assert!(!acceptors.ask(made[2], 1, Request::Read { candidate: None }));
    let _second = Task(tokio::spawn(async move {
        // The lock of the first one ends with its task.
        while let Err(e) = witness::run(w1.clone(), None).await {
            assert!(e.to_string().contains("runs already"), "{e}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }));
    until(&mut news, |n| *n == News::Up { place: 2, id: Some(made[2]) }).await;
}

#[tokio::test]
async fn a_node_of_another_cluster_gets_no_vote() {
    let (ours, theirs) = (TestCluster::new("paris"), TestCluster::new("paris"));
    let w1 = ours.host("w1");
    let _witness = Task(tokio::spawn(witness::run(w1, None)));
    let (h1, stranger) = (ours.host("h1"), theirs.host("h1"));
    let at = |c: &TestCluster, p| places(p, &c.cluster, &"h1".parse().unwrap(), &"h2".parse().unwrap()).remove(2);
    make(&h1, &at(&ours, &h1)).await;
    let refused = ask_once(&stranger, &at(&ours, &stranger), MODULE, Ask::Who).await;
    assert!(refused.is_err(), "{refused:?}");
}

#[test]
fn requests_and_answers_read_back_and_hostile_bytes_do_not_panic() {
    let calls = [read(), Ask::Who, Ask::Make, Ask::Forget].map(|ask| Call { nonce: 9, module: MODULE, ask });
    for call in calls {
        let bytes = call.encode();
        assert_eq!(Call::decode(&bytes[4..]), Ok(call));
        for cut in 4..bytes.len() {
            assert!(Call::decode(&bytes[4..cut]).is_err());
        }
    }
    let answer = Answer { acceptor: AcceptorId(1), changes: 2, reply: Core::Refused(Refusal::NotVoter) };
    let long = "ü".repeat(400);
    for reply in [Reply::Core(answer), Reply::Id(None), Reply::Id(Some(AcceptorId(3))), Reply::Refused("no".into())] {
        assert_eq!(Reply::decode(&reply.encode(7)[4..]), Ok((7, reply)));
    }
    let Ok((7, Reply::Refused(cut))) = Reply::decode(&Reply::Refused(long.clone()).encode(7)[4..]) else { panic!() };
    assert!(long.starts_with(&cut) && cut.len() > 400);
    proptest::proptest!(proptest::prelude::ProptestConfig { failure_persistence: None, ..Default::default() },
    |(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200))| {
        let _ = (Call::decode(&bytes), Reply::decode(&bytes));
    });
}

#[tokio::test]
async fn an_absurd_length_ends_the_connection_and_nothing_else() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let folder = tempfile::tempdir().unwrap();
    let voters = Voters::open(folder.path().to_owned()).unwrap();
    let (mut us, them) = tokio::io::duplex(64);
    let serve = voters.serve(them, |_, _| ());
    let talk = async {
        us.write_all(&u32::MAX.to_le_bytes()).await.unwrap();
        us.read(&mut [0]).await
    };
    let (served, read) = tokio::join!(serve, talk);
    assert!(served.unwrap_err().to_string().contains("8192 are allowed"));
    assert_eq!(read.unwrap(), 0);
}

struct Task(JoinHandle<std::io::Result<()>>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn read() -> Ask {
    Ask::Core(Request::Read { candidate: None })
}

fn core(reply: Reply) -> Answer {
    let Reply::Core(answer) = reply else { panic!("{reply:?}") };
    answer
}

fn state(answer: Answer) -> AcceptorState {
    let Core::State(state) = answer.reply else { panic!("{answer:?}") };
    state
}

/// Makes a voter; its process may still be on its way up.
async fn make(paths: &crate::config::Paths, place: &Place) -> AcceptorId {
    let make = async {
        loop {
            match ask_once(paths, place, MODULE, Ask::Make).await {
                Ok(Reply::Id(Some(id))) => return id,
                Ok(other) => panic!("{other:?}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    };
    tokio::time::timeout(LONG, make).await.unwrap_or_else(|_| panic!("no contact with {place:?}"))
}

async fn until(news: &mut Receiver<News>, wanted: impl Fn(&News) -> bool) -> News {
    let find = async {
        loop {
            let one = news.recv().await.expect("the dialers live");
            if wanted(&one) {
                return one;
            }
        }
    };
    tokio::time::timeout(LONG, find).await.expect("the news comes")
}

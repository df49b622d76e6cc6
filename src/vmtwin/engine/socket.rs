//! The module process's control socket, /run/vmtwin/NAME.sock: one JSON object a line, requests in, answers out.
//!
//! Holds: connections. Keeps out: every decision; requests go to the control loop and its answers come back. Only root (and
//! whom the process itself runs as) is listened to. A command is answered when it is done, or refused.
use super::control::News;
use crate::api::types::ModuleStatus;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;

/// Longest line of a request, in bytes.
const REQUEST_BYTES_MAX: u64 = 4096;
/// Longest line of an answer, in bytes.
const ANSWER_BYTES_MAX: u64 = 1 << 20;
/// `follow` gives a status this often.
const FOLLOW: Duration = Duration::from_millis(250);

/// A request: `{"do":"swap"}`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// How it stands.
    Status,
    /// How it stands, again and again, until the caller hangs up.
    Follow,
    /// Run the VM again if it was given up; else nothing.
    Start,
    /// Stop the module.
    Stop {
        /// On both nodes; each process is told. False: just here.
        #[serde(default = "yes")]
        both: bool,
    },
    /// The VM to the other node.
    Swap,
    /// The VM, in place.
    Restart,
    /// Start here if the record allows it.
    Prim,
    /// Be the replica here.
    Second,
    /// The hook: may the VM start here now?
    MayStart,
    /// Compare both replicas; answered when it began. `status` tells how it goes on.
    Verify {
        /// Bytes a second, at most.
        rate: u64,
        /// What differs is overwritten on the peer.
        #[serde(default)]
        repair: bool,
    },
}

fn yes() -> bool {
    true
}

/// An answer: `{"ok":true}`, `{"ok":true,"status":{...}}`, or `{"ok":false,"error":"...","code":3}`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Done.
    pub ok: bool,
    /// To `status` and `follow`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub status: Option<ModuleStatus>,
    /// To `verify`: when it began, milliseconds since 1970; its status has the same.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub begun_ms: Option<u64>,
    /// One sentence that says what to do.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
    /// The exit code of the CLI.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub code: Option<u8>,
}

impl Answer {
    /// It was done.
    #[must_use]
    pub fn done() -> Self {
        Self { ok: true, ..Self::default() }
    }
    /// It was not.
    #[must_use]
    pub fn refused(code: u8, error: impl Into<String>) -> Self {
        Self { error: Some(error.into()), code: Some(code), ..Self::default() }
    }
    /// How it stands.
    #[must_use]
    pub fn status(status: ModuleStatus) -> Self {
        Self { ok: true, status: Some(status), ..Self::default() }
    }
}

/// Asks a module process once and waits for its answer, however long that takes: callers set their own limit.
///
/// # Errors
/// `NotFound` or `ConnectionRefused` where there is no such process; `UnexpectedEof` where it ended before it answered.
pub async fn ask(socket: &Path, request: &Request) -> io::Result<Answer> {
    let mut stream = UnixStream::connect(socket).await?;
    stream.write_all(&line(request)).await?;
    let mut answer = String::new();
    if BufReader::new(stream).take(ANSWER_BYTES_MAX).read_line(&mut answer).await? == 0 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the module process ended"));
    }
    serde_json::from_str(&answer).map_err(io::Error::other)
}

fn line(value: &impl Serialize) -> Vec<u8> {
    let mut line = serde_json::to_vec(value).expect("plain values become JSON");
    line.push(b'\n');
    line
}

/// Listens at `path`, in place of what a dead process left there.
///
/// # Errors
/// As bind(2) says.
pub fn listen(path: &Path, news: UnboundedSender<News>) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(why) if why.kind() != io::ErrorKind::NotFound => return Err(why),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) if is_allowed(&stream) => {
                    // A caller that goes wrong ends its own connection only.
                    tokio::spawn(serve(stream, news.clone()));
                }
                Ok(_) => {}
                Err(why) => {
                    eprintln!("control socket: {why}");
                    tokio::time::sleep(FOLLOW).await;
                }
            }
        }
    });
    Ok(())
}

fn is_allowed(stream: &UnixStream) -> bool {
    let own = rustix::process::geteuid().as_raw();
    stream.peer_cred().is_ok_and(|caller| caller.uid() == 0 || caller.uid() == own)
}

async fn serve(stream: UnixStream, news: UnboundedSender<News>) -> io::Result<()> {
    let (from, mut to) = stream.into_split();
    let mut from = BufReader::new(from);
    let mut text = String::new();
    loop {
        text.clear();
        if (&mut from).take(REQUEST_BYTES_MAX).read_line(&mut text).await? == 0 {
            return Ok(());
        }
        let request = match serde_json::from_str(&text) {
            Ok(request) => request,
            Err(why) => {
                return to.write_all(&line(&Answer::refused(2, format!("no request of this version: {why}")))).await;
            }
        };
        loop {
            let (answer, answered) = oneshot::channel();
            if news.send(News::Request(request, answer)).is_err() {
                return Ok(());
            }
            // The loop ends with its answers out: a dropped one means that the process ends.
            let Ok(answer) = answered.await else { return Ok(()) };
            to.write_all(&line(&answer)).await?;
            if request != Request::Follow {
                break;
            }
            tokio::time::sleep(FOLLOW).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read_as_they_are_documented() {
        let read = |text: &str| serde_json::from_str::<Request>(text).map_err(drop);
        assert_eq!(read(r#"{"do":"stop"}"#), Ok(Request::Stop { both: true }));
        assert_eq!(read(r#"{"do":"stop","both":false}"#), Ok(Request::Stop { both: false }));
        assert_eq!(read(r#"{"do":"may-start"}"#), Ok(Request::MayStart));
        for bad in ["", "{}", r#"{"do":"explode"}"#, r#"{"do":"stop","both":1}"#, "[1]", "\u{0}"] {
            assert!(read(bad).is_err(), "{bad}");
        }
        assert_eq!(line(&Answer::done()), b"{\"ok\":true}\n");
        assert_eq!(line(&Answer::refused(3, "no")), b"{\"ok\":false,\"error\":\"no\",\"code\":3}\n");
    }

    #[tokio::test]
    async fn a_request_reaches_the_loop_and_rubbish_only_ends_its_own_connection() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let (to, mut news) = tokio::sync::mpsc::unbounded_channel();
        listen(&path, to).unwrap();
        tokio::spawn(async move {
            while let Some(News::Request(request, answer)) = news.recv().await {
                let _ = answer.send(match request {
                    Request::Prim => Answer::refused(3, "no"),
                    _ => Answer::done(),
                });
            }
        });
        let mut rubbish = UnixStream::connect(&path).await.unwrap();
        rubbish.write_all(b"\xff\xfe{}\n").await.unwrap();
        let mut rest = Vec::new();
        let _ = rubbish.read_to_end(&mut rest).await;
        assert_eq!(ask(&path, &Request::Swap).await.unwrap(), Answer::done());
        assert_eq!(ask(&path, &Request::Prim).await.unwrap(), Answer::refused(3, "no"));
    }
}

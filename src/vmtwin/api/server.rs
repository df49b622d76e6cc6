//! Connections to the API: whose they are, what each may ask, and how a failure looks.
//!
//! Invariant: who shows no certificate can join and nothing else; requests are bounded in size and time.
use super::routes;
use super::types::ErrorBody;
use crate::config::Paths;
use crate::config::paths::PORT_API;
use crate::listen::{self, Door, Place, STRANGER_TIME};
use crate::node::Node;
use crate::trust::{self, Identity};
use crate::{host, keep};
use axum::Json;
use axum::body::Body;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Router};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustls::ServerConfig;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixListener};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

/// Longest body of a request.
pub const BODY_BYTES_MAX: usize = 512 * 1024;
const HEAD_TIME: Duration = Duration::from_secs(10);
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// A connection of a stranger ends by then, whatever it does: a join takes a second.
const JOIN_TIME: Duration = Duration::from_secs(30);

/// Who calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    /// Root on this host.
    Root,
    /// A node of the cluster, by its certificate.
    Node(String),
    /// Nobody known.
    Stranger,
}

/// A failure as an answer.
pub struct Failure(pub ErrorBody);

impl From<ErrorBody> for Failure {
    fn from(body: ErrorBody) -> Self {
        Self(body)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = match self.0.code {
            2 => StatusCode::BAD_REQUEST,
            3 => StatusCode::CONFLICT,
            4 | 5 => StatusCode::BAD_GATEWAY,
            6 => StatusCode::FORBIDDEN,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, Json(self.0)).into_response()
    }
}

/// Lets strangers through to one route only.
pub async fn only_members(request: Request<Body>, next: Next) -> Response {
    let caller = request.extensions().get::<Caller>().cloned().unwrap_or(Caller::Stranger);
    if caller == Caller::Stranger && request.uri().path() != routes::JOIN {
        let error = "not authorised: without a certificate of this cluster only a join is answered".to_owned();
        return Failure(ErrorBody { error, code: 6 }).into_response();
    }
    next.run(request).await
}

/// Serves root's processes of this host, for ever.
pub async fn serve_locally(listener: UnixListener, node: Arc<Node>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) if keep::is_ours(&stream) => {
                tokio::spawn(serve(stream, routes::router(node.clone()), Caller::Root));
            }
            Ok(_) => {}
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// Serves the other nodes, for ever.
pub async fn serve_nodes(paths: Paths, node: Arc<Node>) {
    let door = Arc::new(Door::default());
    let shared = paths.clone();
    listen::follow(&paths, PORT_API, move |address| {
        let tls = match trust::api_server_config(&shared) {
            Ok(tls) => tls,
            Err(e) => {
                host::warn(&e.to_string());
                return None;
            }
        };
        let node = node.clone();
        let serve = move |stream, _, place| serve_caller(tls.clone(), node.clone(), stream, place);
        Some(tokio::spawn(listen::at(address, door.clone(), serve)))
    })
    .await;
}

async fn serve_caller(tls: Arc<ServerConfig>, node: Arc<Node>, stream: TcpStream, place: Place) {
    let stream = match timeout(STRANGER_TIME, TlsAcceptor::from(tls).accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(e)) => return place.turned_away(&format!("no handshake: {e}")),
        Err(_) => return place.turned_away("no handshake in time"),
    };
    let router = routes::router(node);
    match Identity::of_peer(stream.get_ref().1.peer_certificates()) {
        Some(identity) => {
            drop(place);
            serve(stream, router, Caller::Node(identity.name)).await;
        }
        None => {
            if timeout(JOIN_TIME, serve(stream, router, Caller::Stranger)).await.is_err() {
                place.turned_away("it did not come to an end");
            }
        }
    }
}

async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, router: Router, caller: Caller) {
    let service = TowerToHyperService::new(router.layer(Extension(caller)));
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    // A caller that hung up is no news.
    drop(served);
}

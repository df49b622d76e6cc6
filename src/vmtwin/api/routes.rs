//! All routes. A body is read whole and checked before anything is done.
use super::server::{BODY_BYTES_MAX, Failure, only_members};
use super::types::{
    ApplyRequest, ClusterStatus, CommandRequest, ConfigAnswer, ConfigRequest, Done, ErrorBody, JoinAnswer, JoinRequest,
    NodeStatus, ProtectRequest, StatusAnswer, UnprotectRequest, VerifyRequest, VerifyStarted,
};
use crate::api::client::failed;
use crate::eventlog;
use crate::node::Node;
use crate::node::protect::{PeerStep, PeerStepAnswer};
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use std::sync::Arc;

/// The one route for strangers.
pub const JOIN: &str = "/v1/join";

type Answer<T> = Result<Json<T>, Failure>;
type Me = State<Arc<Node>>;

/// Everything that a daemon answers.
pub fn router(node: Arc<Node>) -> Router {
    Router::new()
        .route(JOIN, post(join))
        .route("/v1/node", get(node_status))
        .route("/v1/cluster", get(cluster_status))
        .route("/v1/status", get(status))
        .route("/v1/log", get(log))
        .route("/v1/command", post(command))
        .route("/v1/verify", post(verify))
        .route("/v1/apply", post(apply))
        .route("/v1/config", post(config))
        .route("/v1/protect", post(protect))
        .route("/v1/protect/peer", post(protect_peer))
        .route("/v1/unprotect", post(unprotect))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(axum::middleware::from_fn(only_members))
        .with_state(node)
}

/// Of which module, and whether of this node only.
#[derive(Debug, Deserialize)]
pub struct Which {
    module: Option<String>,
    #[serde(default)]
    here: bool,
    limit: Option<usize>,
}

/// An act is carried to its end, also when its caller hangs up in the middle.
async fn whole<T: Send + 'static>(act: impl Future<Output = Result<T, ErrorBody>> + Send + 'static) -> Answer<T> {
    match tokio::spawn(act).await {
        Ok(done) => Ok(Json(done?)),
        Err(_) => Err(failed(1, "the daemon failed at it: its output tells why").into()),
    }
}

async fn join(State(node): Me, Json(request): Json<JoinRequest>) -> Answer<JoinAnswer> {
    whole(async move { node.join(request).await }).await
}

async fn node_status(State(node): Me) -> Json<NodeStatus> {
    Json(node.node_status())
}

async fn cluster_status(State(node): Me) -> Answer<ClusterStatus> {
    Ok(Json(node.cluster_status().await?))
}

async fn status(State(node): Me, Query(which): Query<Which>) -> Answer<StatusAnswer> {
    Ok(Json(node.status(which.module.as_deref(), which.here).await?))
}

async fn log(State(node): Me, Query(which): Query<Which>) -> Answer<Vec<eventlog::Event>> {
    let module = which.module.unwrap_or_default();
    Ok(Json(node.log(&module, which.limit.unwrap_or(1000), which.here).await?))
}

async fn command(State(node): Me, Json(request): Json<CommandRequest>) -> Answer<Done> {
    whole(async move { node.command(request).await }).await
}

async fn verify(State(node): Me, Json(request): Json<VerifyRequest>) -> Answer<VerifyStarted> {
    whole(async move { node.verify(request).await }).await
}

async fn apply(State(node): Me, Json(request): Json<ApplyRequest>) -> Answer<Done> {
    whole(async move { node.apply(request).await }).await
}

async fn config(State(node): Me, Json(request): Json<ConfigRequest>) -> Answer<ConfigAnswer> {
    Ok(Json(node.take_config(&request)?))
}

async fn protect(State(node): Me, Json(request): Json<ProtectRequest>) -> Answer<Done> {
    whole(async move { node.protect(request).await }).await
}

async fn protect_peer(State(node): Me, Json(step): Json<PeerStep>) -> Answer<PeerStepAnswer> {
    whole(async move { node.protect_step(step).await }).await
}

async fn unprotect(State(node): Me, Json(request): Json<UnprotectRequest>) -> Answer<Done> {
    whole(async move { node.unprotect(request).await }).await
}

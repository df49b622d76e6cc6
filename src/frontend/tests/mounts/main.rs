//! The FUSE front end on real mounts, served by a small pass-through server.
mod cases;
mod harness;
mod lives;
mod model;
mod server;

//! Data threads with real mounts, rings and sockets; the test plays the control planes and the register.
mod harness;
mod life;
#[path = "../../../../frontend/tests/mounts/lives.rs"]
mod lives;
mod mirrored;
mod single;

//! Data threads with real mounts, rings and sockets; the test plays the control planes and the register.
mod harness;
mod mirrored;
mod single;

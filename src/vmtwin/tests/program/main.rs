//! The whole program, as processes on loopback addresses of their own.
mod cluster;
mod lab;
mod module;

//! The link between the two module processes: one connection at a time, frames in order with a delay, cuts that lose what
//! is under way and are noticed late, and stray frames of connections that are gone.
use super::disk::Payload;
use vmtwin_core::wire::frame::Header;
use vmtwin_core::wire::message::Hello;

/// What travels.
#[derive(Clone, Debug)]
pub enum Packet {
    Hello(Hello),
    Frame { header: Header, body: Vec<u8>, payload: Option<Payload> },
}

/// Both directions of the connection.
#[derive(Debug, Default)]
pub struct Net {
    /// The number of the newest connection.
    pub connection: u64,
    /// Which connection each node believes to have; 0: none.
    pub known: [u64; 2],
    /// Whether cables and switches work.
    pub works: bool,
    /// Whether packets of the newest connection arrive.
    pub alive: bool,
    /// When the last packet to each node arrives: order is kept.
    pub last_arrival: [u64; 2],
    /// Extra delay, in nanoseconds: a slow link or peer.
    pub slow_ns: u64,
}

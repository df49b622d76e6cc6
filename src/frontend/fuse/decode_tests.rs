//! The decoder against messages as the kernel makes them, and against anything else.
use super::abi::{Bytes, IN_HEADER_BYTES, WRITE_HEAD_BYTES, op};
use super::decode::{Decoded, decode};
use super::request::{Operation, SetAttr, SetTime};
use super::{Forget, Timestamp};
use proptest::prelude::*;
use rustix::io::Errno;
use vmtwin_core::ids::FileId;
use vmtwin_core::limits::{PAYLOAD_BYTES_MAX, XATTR_BYTES_MAX};
use vmtwin_ring::{PAYLOAD_BYTES, Pool};

fn message(code: u32, body: &[u8]) -> Vec<u8> {
    let mut out = Bytes::default();
    out.u32((IN_HEADER_BYTES + body.len()) as u32).u32(code).u64(77).u64(5).u32(1000).u32(1001).u32(1002).u32(0);
    out.0.extend_from_slice(body);
    out.0
}

fn body(make: impl FnOnce(&mut Bytes) -> &mut Bytes) -> Vec<u8> {
    let mut out = Bytes::default();
    make(&mut out);
    out.0
}

fn decoded(message: &[u8]) -> Decoded {
    let mut slot = Pool::new(1).unwrap().take().unwrap();
    slot.headed_mut(WRITE_HEAD_BYTES)[..message.len()].copy_from_slice(message);
    decode(slot, message.len())
}

fn operation(code: u32, body: &[u8]) -> Result<Operation, Errno> {
    match decoded(&message(code, body)) {
        Decoded::Request(request) => {
            assert_eq!((request.ticket.id(), request.node), (77, FileId(5)));
            assert_eq!((request.caller.uid, request.caller.gid, request.caller.pid), (1000, 1001, 1002));
            Ok(request.operation)
        }
        Decoded::Refuse(ticket, errno) => {
            assert_eq!(ticket.id(), 77);
            Err(errno)
        }
        other => panic!("{other:?}"),
    }
}

/// As text, for comparison.
fn shown(code: u32, body: &[u8]) -> String {
    format!("{:?}", operation(code, body).unwrap())
}

fn write_body(offset: u64, size: u32, data: &[u8]) -> Vec<u8> {
    let mut out = body(|b| b.u64(9).u64(offset).u32(size).zeroes(20));
    out.extend_from_slice(data);
    out
}

#[test]
fn a_writes_data_lies_at_the_start_of_its_slot() {
    let Ok(Operation::Write { handle, offset, size, slot }) = operation(op::WRITE, &write_body(512, 6, b"block!"))
    else {
        panic!("a write");
    };
    assert_eq!((handle, offset, size, &slot.payload()[..6]), (9, 512, 6, &b"block!"[..]));
    let most = vec![7; PAYLOAD_BYTES_MAX];
    assert!(operation(op::WRITE, &write_body(0, most.len() as u32, &most)).is_ok());
    let more = vec![7; PAYLOAD_BYTES_MAX + 1];
    assert_eq!(operation(op::WRITE, &write_body(0, more.len() as u32, &more)).unwrap_err(), Errno::INVAL);
    assert_eq!(operation(op::WRITE, &write_body(0, 7, b"block!")).unwrap_err(), Errno::INVAL);
    assert_eq!(operation(op::WRITE, &write_body(i64::MAX as u64 - 5, 6, b"block!")).unwrap_err(), Errno::FBIG);
    assert_eq!(operation(op::WRITE, &write_body(u64::MAX, 6, b"block!")).unwrap_err(), Errno::FBIG);
}

#[test]
fn names_arrive_whole_and_only_if_they_are_names() {
    assert!(matches!(operation(op::LOOKUP, b"disk.qcow2\0"), Ok(Operation::Lookup { name }) if name == b"disk.qcow2"));
    for bad in [&b""[..], b"\0", b".\0", b"..\0", b"a/b\0", b"/\0", b"no end"] {
        assert_eq!(operation(op::LOOKUP, bad).unwrap_err(), Errno::INVAL, "{bad:?}");
    }
    let long = [vec![b'n'; 256], vec![0]].concat();
    assert_eq!(operation(op::UNLINK, &long).unwrap_err(), Errno::NAMETOOLONG);
    assert!(operation(op::UNLINK, &long[1..]).is_ok());
    let both = operation(op::SYMLINK, b"link\0../where/ever\0").unwrap();
    assert!(matches!(both, Operation::Symlink { name, target } if name == b"link" && target == b"../where/ever"));
    let target = [b"link\0".to_vec(), vec![b't'; 4096], vec![0]].concat();
    assert_eq!(operation(op::SYMLINK, &target).unwrap_err(), Errno::NAMETOOLONG);
}

#[test]
fn each_operation_reads_its_own_fields() {
    let named = |make: fn(&mut Bytes) -> &mut Bytes, name: &[u8]| [body(make), name.to_vec()].concat();
    let a = format!("{:?}", b"a".to_vec());
    let b = format!("{:?}", b"b".to_vec());
    let cases = [
        (
            op::MKNOD,
            named(|f| f.u32(0o100_644).u32(3).u32(0o22).u32(0), b"a\0"),
            format!("MkNod {{ name: {a}, mode: 33188, rdev: 3 }}"),
        ),
        (op::MKDIR, named(|f| f.u32(0o755).u32(0o22), b"a\0"), format!("MkDir {{ name: {a}, mode: 493 }}")),
        (
            op::CREATE,
            named(|f| f.u32(2).u32(0o600).u32(0).u32(0), b"a\0"),
            format!("Create {{ name: {a}, flags: 2, mode: 384 }}"),
        ),
        (op::LINK, named(|f| f.u64(6), b"a\0"), format!("Link {{ file: FileId(6), name: {a} }}")),
        (
            op::RENAME,
            named(|f| f.u64(6), b"a\0b\0"),
            format!("Rename {{ name: {a}, new_parent: FileId(6), new_name: {b}, flags: 0 }}"),
        ),
        (
            op::RENAME2,
            named(|f| f.u64(6).u32(2).u32(0), b"a\0b\0"),
            format!("Rename {{ name: {a}, new_parent: FileId(6), new_name: {b}, flags: 2 }}"),
        ),
        (op::SETXATTR, named(|f| f.u32(1).u32(2), b"a\0b"), format!("SetXattr {{ name: {a}, value: {b}, flags: 2 }}")),
        (op::GETXATTR, named(|f| f.u32(10).u32(0), b"a\0"), format!("GetXattr {{ name: {a}, size: 10 }}")),
        (op::REMOVEXATTR, b"a\0".to_vec(), format!("RemoveXattr {{ name: {a} }}")),
        (op::LISTXATTR, body(|f| f.u32(10).u32(0)), "ListXattr { size: 10 }".into()),
        (op::GETATTR, body(|f| f.u32(1).u32(0).u64(4)), "GetAttr { handle: Some(4) }".into()),
        (op::GETATTR, body(|f| f.u32(0).u32(0).u64(4)), "GetAttr { handle: None }".into()),
        (op::READLINK, Vec::new(), "ReadLink".into()),
        (op::OPEN, body(|f| f.u32(2).u32(0)), "Open { flags: 2 }".into()),
        (op::READ, body(|f| f.u64(9).u64(10).u32(11).zeroes(20)), "Read { handle: 9, offset: 10, size: 11 }".into()),
        (op::RELEASE, body(|f| f.u64(9).u32(2).zeroes(12)), "Release { handle: 9, flags: 2 }".into()),
        (op::FSYNC, body(|f| f.u64(9).u32(1).u32(0)), "FSync { handle: 9, data_only: true }".into()),
        (op::FSYNCDIR, body(|f| f.u64(9).u32(0).u32(0)), "FSyncDir { handle: 9, data_only: false }".into()),
        (
            op::READDIRPLUS,
            body(|f| f.u64(9).u64(3).u32(4096).zeroes(20)),
            "ReadDir { handle: 9, offset: 3, size: 4096, plus: true }".into(),
        ),
        (
            op::FALLOCATE,
            body(|f| f.u64(9).u64(1).u64(2).u32(3).u32(0)),
            "FAllocate { handle: 9, offset: 1, length: 2, mode: 3 }".into(),
        ),
        (op::LSEEK, body(|f| f.u64(9).u64(1).u32(4).u32(0)), "LSeek { handle: 9, offset: 1, whence: 4 }".into()),
        (op::STATFS, Vec::new(), "StatFs".into()),
    ];
    for (code, body, expected) in cases {
        assert_eq!(shown(code, &body), expected);
        let fixed = !matches!(code, op::READLINK | op::STATFS);
        for cut in 0..body.len() {
            let short = operation(code, &body[..cut]);
            assert!(!fixed || short.is_err() || cut > 3, "{code} with {cut} bytes is {short:?}");
        }
    }
}

#[test]
fn only_the_attributes_that_are_meant_are_set() {
    let fields = |valid: u32| {
        body(|f| {
            f.u32(valid).u32(0).u64(9).u64(4096).u64(0).u64(100).u64(200).u64(300);
            f.u32(1).u32(2_000_000_000).u32(3).u32(0o640).u32(0).u32(7).u32(8).u32(0)
        })
    };
    let set = |valid| match operation(op::SETATTR, &fields(valid)).unwrap() {
        Operation::SetAttr(set) => set,
        other => panic!("{other:?}"),
    };
    assert_eq!(set(0), SetAttr::default());
    let all = set(0x7f);
    assert_eq!(
        (all.handle, all.mode, all.uid, all.gid, all.size),
        (Some(9), Some(0o640), Some(7), Some(8), Some(4096))
    );
    assert_eq!(all.atime, Some(SetTime::At(Timestamp { seconds: 100, nanos: 1 })));
    assert_eq!(all.mtime, Some(SetTime::At(Timestamp { seconds: 200, nanos: 999_999_999 })), "bounded");
    let now = set(0x1b0);
    assert_eq!((now.atime, now.mtime, now.size), (Some(SetTime::Now), Some(SetTime::Now), None));
}

#[test]
fn bounds_are_kept() {
    let read = |offset: u64, size: u32| operation(op::READ, &body(|f| f.u64(1).u64(offset).u32(size).zeroes(20)));
    assert!(read(0, PAYLOAD_BYTES_MAX as u32).is_ok());
    assert_eq!(read(0, PAYLOAD_BYTES_MAX as u32 + 1).unwrap_err(), Errno::INVAL);
    assert_eq!(read(i64::MAX as u64, 1).unwrap_err(), Errno::FBIG);
    let allocate = |offset: u64, length: u64, mode: u32| {
        operation(op::FALLOCATE, &body(|f| f.u64(1).u64(offset).u64(length).u32(mode).u32(0)))
    };
    assert!(allocate(i64::MAX as u64 - 1, 1, 3).is_ok());
    assert_eq!(allocate(i64::MAX as u64, 1, 3).unwrap_err(), Errno::FBIG);
    assert_eq!(allocate(u64::MAX, u64::MAX, 0).unwrap_err(), Errno::FBIG);
    assert_eq!(allocate(0, 0, 0).unwrap_err(), Errno::INVAL);
    assert_eq!(allocate(0, 4096, 8).unwrap_err(), Errno::OPNOTSUPP);
    let value = vec![1; XATTR_BYTES_MAX + 1];
    let set =
        |value: &[u8]| [body(|f| f.u32(value.len() as u32).u32(0)), b"user.a\0".to_vec(), value.to_vec()].concat();
    assert!(operation(op::SETXATTR, &set(&value[1..])).is_ok());
    assert_eq!(operation(op::SETXATTR, &set(&value)).unwrap_err(), Errno::INVAL);
    let code = 47; // COPY_FILE_RANGE
    assert_eq!(operation(code, &[0; 56]).unwrap_err(), Errno::NOSYS);
}

#[test]
fn what_needs_no_answer_gets_none() {
    let one = decoded(&message(op::FORGET, &3u64.to_ne_bytes()));
    assert!(matches!(one, Decoded::Forget(list) if list == [Forget { node: FileId(5), count: 3 }]));
    let announced = body(|f| f.u32(u32::MAX).u32(0).u64(8).u64(1).u64(9).u64(2).u64(10));
    let Decoded::Forget(list) = decoded(&message(op::BATCH_FORGET, &announced)) else { panic!("forgets") };
    assert_eq!(list, [Forget { node: FileId(8), count: 1 }, Forget { node: FileId(9), count: 2 }]);
    assert!(matches!(decoded(&message(op::INTERRUPT, &66u64.to_ne_bytes())), Decoded::Interrupt(66)));
    let whole = message(op::LOOKUP, b"name\0");
    let (cut, mut lying) = (&whole[..whole.len() - 1], whole.clone());
    lying[0] += 1;
    assert!(matches!(decoded(cut), Decoded::Nothing));
    assert!(matches!(decoded(&lying), Decoded::Nothing));
    assert!(matches!(decoded(&[]), Decoded::Nothing));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the bytes: no panic, and what comes out keeps the bounds that `Operation` states.
    #[test]
    fn any_bytes_are_decoded_or_refused(code in 0u32..60, honest in any::<bool>(), bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let mut whole = message(code, &bytes);
        if !honest {
            whole = bytes;
        }
        if let Decoded::Request(request) = decoded(&whole) {
            check(&request.operation);
        }
    }

    /// As above, with numbers that are near to real ones.
    #[test]
    fn near_misses_are_decoded_or_refused(
        code in 0u32..60,
        numbers in proptest::collection::vec(prop_oneof![0u32..20, Just(u32::MAX), Just(1 << 20), Just(i32::MAX as u32)], 0..24),
        tail in "[a/.\u{0}]{0,12}",
    ) {
        let mut bytes = body(|b| numbers.iter().fold(b, |b, n| b.u32(*n)));
        bytes.extend_from_slice(tail.as_bytes());
        if let Decoded::Request(request) = decoded(&message(code, &bytes)) {
            check(&request.operation);
        }
    }
}

fn check(operation: &Operation) {
    use Operation as O;
    let name = |n: &[u8]| {
        assert!((1..=255).contains(&n.len()) && n != b"." && n != b".." && !n.contains(&0) && !n.contains(&b'/'));
    };
    let span = |offset: u64, len: u64| assert!(offset.checked_add(len).is_some_and(|end| end <= i64::MAX as u64));
    match operation {
        O::Lookup { name: n }
        | O::Symlink { name: n, .. }
        | O::MkNod { name: n, .. }
        | O::MkDir { name: n, .. }
        | O::Unlink { name: n }
        | O::RmDir { name: n }
        | O::Link { name: n, .. }
        | O::Create { name: n, .. } => name(n),
        O::Rename { name: n, new_name, new_parent, .. } => {
            name(n);
            name(new_name);
            assert_ne!(new_parent.0, 0);
        }
        O::Read { offset, size, .. } => {
            span(*offset, u64::from(*size));
            assert!(*size as usize <= PAYLOAD_BYTES_MAX);
        }
        O::Write { offset, size, .. } => {
            span(*offset, u64::from(*size));
            assert!(*size as usize <= PAYLOAD_BYTES.min(PAYLOAD_BYTES_MAX));
        }
        O::FAllocate { offset, length, .. } => span(*offset, *length),
        O::SetXattr { value, .. } => assert!(value.len() <= XATTR_BYTES_MAX),
        _ => {}
    }
}

//! The one file of unsafe in this crate: event callbacks, and three calls that the binding lacks or gets wrong.
//!
//! What crosses into libvirt is a `Listener` in a box; libvirt owns it from a registration that succeeded until it calls
//! `forget`. A callback runs on the event thread, looks at the domain's name and sends a `Raw`: it never calls libvirt back.
#![allow(unsafe_code)]
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::mem::transmute;
use std::ptr;
use std::sync::Once;
use std::sync::mpsc::Sender;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::Error;
use virt_sys as sys;

/// What a callback saw, untranslated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Raw {
    /// `virDomainEventType` and its detail.
    Lifecycle { event: u32, detail: u32 },
    /// Reset or rebooted from inside.
    Reboot,
    /// A disk request failed; whether the VM was paused for it.
    IoError { paused: bool },
    /// The connection with this number is gone.
    Closed { link: u64 },
}

struct Listener {
    name: CString,
    link: u64,
    to: Sender<Raw>,
}

/// Registers libvirt's default event loop and runs it on a thread of its own, once per process. To be called before the
/// first connection is opened.
pub(super) fn run_event_loop() -> Result<(), Error> {
    static STARTED: Once = Once::new();
    let mut result = Ok(());
    STARTED.call_once(|| {
        virt::error::clear_error_callback();
        result = virt::event::event_register_default_impl();
        if result.is_ok() {
            let run = || {
                loop {
                    // An error here is libvirt's own poll failing; a pause keeps that from taking a core.
                    if virt::event::event_run_default_impl().is_err() {
                        std::thread::sleep(std::time::Duration::from_millis(100));
                    }
                }
            };
            std::thread::Builder::new().name("libvirt-events".into()).spawn(run).expect("a thread can be made");
        }
    });
    result
}

/// The registrations of one connection; dropping it ends them.
pub(super) struct Subscription {
    connect: Connect,
    callbacks: Vec<c_int>,
}

/// Registers for the events of the VM `name`, which need not be defined yet, and for the end of the connection.
pub(super) fn subscribe(connect: &Connect, name: &str, link: u64, to: &Sender<Raw>) -> Result<Subscription, Error> {
    let name = CString::new(name)?;
    let listener = || Box::into_raw(Box::new(Listener { name: name.clone(), link, to: to.clone() })).cast::<c_void>();
    let mut subscription = Subscription { connect: connect.clone(), callbacks: Vec::new() };
    // SAFETY: libvirt documents that a callback of another type is cast to the generic one for this call, and calls it
    // with the type that belongs to the event id: this is that cast, for each of the three ids below.
    let (lifecycle, io_error) = unsafe {
        (
            transmute::<LifecycleCallback, GenericCallback>(on_lifecycle),
            transmute::<IoErrorCallback, GenericCallback>(on_io_error),
        )
    };
    let wanted: [(u32, GenericCallback); 3] = [
        (sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle),
        (sys::VIR_DOMAIN_EVENT_ID_REBOOT, on_reboot),
        (sys::VIR_DOMAIN_EVENT_ID_IO_ERROR, io_error),
    ];
    for (event, callback) in wanted {
        let opaque = listener();
        // SAFETY: the connection is alive (`connect` holds a reference); `opaque` is a fresh `Listener`, which libvirt
        // hands to `callback` only, and frees by `forget` after the last call of it.
        let id = unsafe {
            sys::virConnectDomainEventRegisterAny(
                connect.as_ptr(),
                ptr::null_mut(),
                event as c_int,
                Some(callback),
                opaque,
                Some(forget),
            )
        };
        if id < 0 {
            let error = Error::last_error();
            // SAFETY: a registration that failed took nothing over, so the box is still ours alone.
            unsafe { forget(opaque) };
            return Err(error);
        }
        subscription.callbacks.push(id);
    }
    let opaque = listener();
    // SAFETY: as above. Drivers without a connection to lose (`test:`) refuse this; that is no error.
    let refused =
        unsafe { sys::virConnectRegisterCloseCallback(connect.as_ptr(), Some(on_close), opaque, Some(forget)) };
    if refused < 0 {
        // SAFETY: refused, so the box is still ours alone.
        unsafe { forget(opaque) };
    }
    Ok(subscription)
}

impl Drop for Subscription {
    fn drop(&mut self) {
        for id in &self.callbacks {
            // SAFETY: the connection is alive (a reference is held). An error means that it is cut: libvirt drops the
            // registrations with it.
            unsafe { sys::virConnectDomainEventDeregisterAny(self.connect.as_ptr(), *id) };
        }
        // SAFETY: as above; not registered is an error that changes nothing.
        unsafe { sys::virConnectUnregisterCloseCallback(self.connect.as_ptr(), Some(on_close)) };
    }
}

type GenericCallback = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut c_void);
type LifecycleCallback =
    unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, c_int, c_int, *mut c_void) -> c_int;
type IoErrorCallback =
    unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *const c_char, *const c_char, c_int, *mut c_void);

/// Sends `raw` if the event is of the listener's VM. Nobody listening any more is no error.
///
/// # Safety
/// `opaque` is a live `Listener`, `domain` a live domain: what libvirt promises for the time of a callback.
unsafe fn tell(domain: sys::virDomainPtr, opaque: *mut c_void, raw: Raw) {
    // SAFETY: the caller's promise; shared access only, as `Sender` is `Sync`.
    let listener = unsafe { &*opaque.cast::<Listener>() };
    // SAFETY: the domain is live, so its name is a C string that lives as long.
    let name = unsafe { sys::virDomainGetName(domain) };
    // SAFETY: checked not to be null; see above.
    if !name.is_null() && unsafe { CStr::from_ptr(name) } == listener.name.as_c_str() {
        let _ = listener.to.send(raw);
    }
}

unsafe extern "C" fn on_lifecycle(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: c_int,
    detail: c_int,
    opaque: *mut c_void,
) -> c_int {
    // SAFETY: libvirt's promise for the time of a callback.
    unsafe { tell(domain, opaque, Raw::Lifecycle { event: event as u32, detail: detail as u32 }) };
    0
}

unsafe extern "C" fn on_reboot(_: sys::virConnectPtr, domain: sys::virDomainPtr, opaque: *mut c_void) {
    // SAFETY: libvirt's promise for the time of a callback.
    unsafe { tell(domain, opaque, Raw::Reboot) };
}

unsafe extern "C" fn on_io_error(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _path: *const c_char,
    _device: *const c_char,
    action: c_int,
    opaque: *mut c_void,
) {
    let paused = action as u32 == sys::VIR_DOMAIN_EVENT_IO_ERROR_PAUSE;
    // SAFETY: libvirt's promise for the time of a callback.
    unsafe { tell(domain, opaque, Raw::IoError { paused }) };
}

unsafe extern "C" fn on_close(_: sys::virConnectPtr, _reason: c_int, opaque: *mut c_void) {
    // SAFETY: `opaque` is the live `Listener` of this registration.
    let listener = unsafe { &*opaque.cast::<Listener>() };
    let _ = listener.to.send(Raw::Closed { link: listener.link });
}

/// Frees a `Listener`: libvirt's last word on a registration.
unsafe extern "C" fn forget(opaque: *mut c_void) {
    // SAFETY: made by `Box::into_raw` in `subscribe`, and given up by whoever calls this.
    drop(unsafe { Box::from_raw(opaque.cast::<Listener>()) });
}

/// State and reason of a domain. (The binding's own call takes a failure for a state.)
pub(super) fn state(domain: &Domain) -> Result<(u32, u32), Error> {
    let (mut state, mut reason) = (0, 0);
    // SAFETY: the domain is alive (a reference is held); both pointers are of locals.
    let result = unsafe { sys::virDomainGetState(domain.as_ptr(), &mut state, &mut reason, 0) };
    if result < 0 { Err(Error::last_error()) } else { Ok((state as u32, reason as u32)) }
}

/// How many checkpoints libvirt knows of a domain.
pub(super) fn checkpoints(domain: &Domain) -> Result<u32, Error> {
    // SAFETY: the domain is alive; a null list asks for the count alone.
    let count = unsafe { sys::virDomainListAllCheckpoints(domain.as_ptr(), ptr::null_mut(), 0) };
    u32::try_from(count).map_err(|_| Error::last_error())
}

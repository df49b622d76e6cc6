//! What `protect` and `unprotect` ask libvirt beside the VM's life.
use super::{Libvirt, ffi};
use crate::{Facts, Hypervisor, Inventory, Listed, VmError, VmResult};
use std::path::PathBuf;
use virt::domain::Domain;
use virt_sys as sys;

impl Inventory for Libvirt {
    fn list(&self) -> VmResult<Vec<Listed>> {
        self.shared.with("list", |connect| {
            let mut listed = Vec::new();
            for domain in connect.list_all_domains(0)? {
                // One that is undefined while we look is not there.
                if let (Ok(name), Ok(xml)) = (domain.name(), domain.xml_desc(sys::VIR_DOMAIN_XML_INACTIVE)) {
                    listed.push(Listed { name, xml });
                }
            }
            Ok(listed)
        })
    }

    fn facts(&self) -> VmResult<Facts> {
        let state = self.state()?;
        self.on("look", |domain| {
            Ok(Facts {
                state,
                persistent: domain.is_persistent()?,
                autostart: domain.autostart()?,
                snapshots: domain.num_snapshots(0)?,
                checkpoints: ffi::checkpoints(domain)?,
                managed_save: domain.has_managed_save(0)?,
            })
        })
    }

    fn set_autostart(&self, on: bool) -> VmResult<()> {
        self.on("autostart", |domain| domain.set_autostart(on).map(drop))
    }

    fn undefine(&self) -> VmResult<()> {
        let keep = |flags: u32| self.on("undefine", |domain: &Domain| domain.undefine_flags(flags).map(drop));
        // libvirt before 8.9 does not know KEEP_TPM, and keeps the state of a TPM anyway.
        let result = keep(sys::VIR_DOMAIN_UNDEFINE_KEEP_NVRAM | sys::VIR_DOMAIN_UNDEFINE_KEEP_TPM);
        let result = match result {
            Err(VmError::Refused { why, .. }) if why.contains("unsupported flags") => {
                keep(sys::VIR_DOMAIN_UNDEFINE_KEEP_NVRAM)
            }
            other => other,
        };
        match result {
            Err(VmError::Undefined { .. }) => Ok(()),
            other => other,
        }
    }

    fn volume_path(&self, pool: &str, volume: &str) -> VmResult<PathBuf> {
        self.shared.with("volume", |connect| {
            connect.lookup_storage_pool_by_name(pool)?.lookup_storage_vol_by_name(volume)?.path().map(PathBuf::from)
        })
    }
}

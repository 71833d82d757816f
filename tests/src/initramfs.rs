//! The two initial file systems: dom0's (the release's packages, a command server on the second serial line) and the PV
//! guest's (busybox, pcifront, device drivers, a command server on its console).

use std::path::Path;

use crate::cpio::Archive;
use crate::packages::Base;
use crate::tools::{Context, Result, read};

/// dom0's init; `@V@` is Xen's version, `@XENSTORED@` the xenstore daemon.
const DOM0_INIT: &str = r#"#!/bin/busybox sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin:/usr/lib/xen-@V@/bin
/usr/bin/busybox --install -s /usr/bin 2>/dev/null
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
mkdir -p /dev/pts; mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /run; mkdir -p /run/xenstored /run/xen /run/lock
for m in xen-evtchn xen-gntdev xen-gntalloc xen-privcmd xenfs; do insmod /modules/$m.ko; done
mount -t xenfs xenfs /proc/xen
@XENSTORED@ --pid-file /run/xenstored.pid
until xenstore-ls >/dev/null 2>&1; do sleep 0.1; done
xen-init-dom0 >/dev/null
xenconsoled --log=all --log-dir=/var/log/xen --pid-file=/run/xenconsoled.pid
until [ -s /run/xenconsoled.pid ]; do sleep 0.1; done
echo "rig: dom0 is up"
@SHELL@
stty -F /dev/ttyS1 raw -echo 115200
while :; do rig-agent serve </dev/ttyS1 >/dev/ttyS1; sleep 1; done
"#;

/// Prints a domain's number, as `xl domid` does, in a hundredth of the time: scenarios ask hundreds of times.
const DOMID: &str = r#"#!/bin/busybox sh
for d in $(xenstore-list /local/domain); do
  [ "$(xenstore-read /local/domain/$d/name 2>/dev/null)" = "$1" ] && echo $d && exit 0
done
echo "$1 is no domain" >&2
exit 1
"#;

/// The guest's init. Kernel messages go to the console until the command server needs it for itself. On its command line
/// `MODULE.PARAMETER=VALUE` is for that module, and `rig.drivers=` says which drivers are loaded: `nvme`, `e1000e`, `disks`,
/// `parts` or `all`, or several of them with commas.
const GUEST_INIT: &str = r#"#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
read -r line </proc/cmdline
# The words that begin with $1, without it, in $found; a process for each would take longer than the module.
words() { found=; for word in $line; do case $word in $1*) found="$found ${word#$1}";; esac; done; }
dif="crct10dif_common crc-t10dif crc64 crc64-rocksoft t10-pi"
nvme="$dif nvme-keyring nvme-auth nvme-core nvme"
disks="$dif scsi_common scsi_mod sd_mod usb-common usbcore usb-storage xhci-hcd xhci-pci-renesas xhci-pci libata libahci ahci"
virtio="virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci failover net_failover virtio_net"
sound="soundcore snd snd-timer snd-pcm snd-hwdep snd-hda-core snd-hda-codec ledtrig-audio snd-hda-codec-generic snd-intel-sdw-acpi snd-intel-dspcfg snd-hda-intel"
words rig.drivers=
list=
for group in ${found//,/ }; do
  case $group in
    nvme) list="$list $nvme";; e1000e) list="$list e1000e";; disks) list="$list $disks";;
    parts) list="$list mii 8139cp $virtio uio uio_pci_generic $sound";; *) list="$nvme e1000e $disks";;
  esac
done
for m in $list xen-pcifront; do
  words $m.
  [ -e /modules/$m.ko ] && insmod /modules/$m.ko $found
done
dmesg -n 1
stty -F /dev/hvc0 raw -echo
while :; do rig-agent serve </dev/hvc0 >/dev/hvc0 2>/dev/null; sleep 1; done
"#;

/// What the project brings into dom0.
#[derive(Debug, Clone, Copy)]
pub struct Parts<'a> {
    /// The helper, linked statically.
    pub agent: &'a Path,
    /// dom0's tool, when it is built.
    pub tool: Option<&'a Path>,
    /// The driver domain's image, when it is built.
    pub image: Option<&'a Path>,
    /// The image of a hostile driver domain, when it is built.
    pub hostile: Option<&'a Path>,
    /// That of a hostile guest, when it is built.
    pub hostile_guest: Option<&'a Path>,
}

fn busybox() -> Result<Vec<u8>> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join("busybox")).find(|path| path.is_file());
    read(found.unwrap_or_else(|| "/bin/busybox".into()))
}

/// The guest's archive.
pub fn guest(base: &Base, agent: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for dir in ["bin", "proc", "sys", "dev", "tmp", "modules"] {
        archive.dir(dir);
    }
    archive.file("bin/busybox", 0o755, &busybox()?);
    archive.file("bin/rig-agent", 0o755, &read(agent)?);
    archive.file("init", 0o755, GUEST_INIT.as_bytes());
    for entry in std::fs::read_dir(&base.modules).context(base.modules.display())?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with("xen-") || name == "xen-pcifront.ko" {
            archive.file(&format!("modules/{name}"), 0o644, &read(entry.path())?);
        }
    }
    Ok(archive.finish())
}

/// dom0's archive. With `shell`, its console ends in a shell for a person.
pub fn dom0(base: &Base, parts: Parts<'_>, shell: bool) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    archive.tree(&base.dom0)?;
    archive.file("usr/bin/busybox", 0o755, &busybox()?);
    archive.file("usr/bin/rig-agent", 0o755, &read(parts.agent)?);
    archive.file("usr/bin/domid", 0o755, DOMID.as_bytes());
    if let Some(tool) = parts.tool {
        archive.file("usr/sbin/xl-pciback", 0o755, &read(tool)?);
    }
    if let Some(image) = parts.image {
        archive.file("usr/lib/xen/boot/pciback-stubdom", 0o644, &read(image)?);
    }
    if let Some(image) = parts.hostile {
        archive.file("usr/lib/xen/boot/pciback-hostile", 0o644, &read(image)?);
    }
    if let Some(image) = parts.hostile_guest {
        archive.file("usr/lib/xen/boot/hostile-guest", 0o644, &read(image)?);
    }
    for entry in std::fs::read_dir(&base.modules).context(base.modules.display())?.flatten() {
        archive.file(&format!("modules/{}", entry.file_name().to_string_lossy()), 0o644, &read(entry.path())?);
    }
    archive.file("boot/vmlinux", 0o644, &read(&base.vmlinux)?);
    archive.file("boot/guest.img", 0o644, &guest(base, parts.agent)?);
    let shell = if shell { "setsid cttyhack sh </dev/hvc0 >/dev/hvc0 2>&1; poweroff -f" } else { "" };
    let init = DOM0_INIT
        .replace("@V@", base.release.xen())
        .replace("@XENSTORED@", base.release.xenstored())
        .replace("@SHELL@", shell);
    archive.file("init", 0o755, init.as_bytes());
    Ok(archive.finish())
}

//! What `xl` knows of domains and of the hypervisor. `xl` is asked rather than libxl linked: its JSON
//! output is stable, and it is there wherever domains are started.
//!
//! Which domains are driver domains, and of what, is read here and nowhere else: from the configuration
//! that the administrator started them with. Any guest may write "I serve this device" into xenstore.

use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use pciback::cmdline::{self, Config, DeviceConfig};
use pciback::sbdf::Sbdf;
use serde_json::Value;

use crate::error::{Failure, Outcome};

/// How long a domain may take to be created while `attach` waits for its configuration.
const CREATION: Duration = Duration::from_secs(10);

/// A guest, as far as attaching a device needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guest {
    /// Domain number.
    pub domid: u32,
    /// Name.
    pub name: String,
    /// `pv`, `pvh` or `hvm`.
    pub kind: String,
    /// `e820_host` in its configuration.
    pub e820_host: bool,
    /// `passthrough` in its configuration.
    pub passthrough: String,
}

/// A driver domain, as its xl configuration has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Driver {
    /// Domain number.
    pub domid: u32,
    /// Name.
    pub name: String,
    /// Its command line.
    pub config: Config,
}

impl Driver {
    /// What its command line says of a function.
    pub fn entry(&self, sbdf: Sbdf) -> Option<&DeviceConfig> {
        self.config.devices.iter().find(|device| device.sbdf == sbdf)
    }
}

/// What `xl info` says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct XenInfo {
    /// Xen's command line.
    pub commandline: String,
    /// What the machine can do.
    pub virt_caps: String,
}

impl XenInfo {
    /// Whether Xen was booted so that it does not know ECAM, and domains may write it.
    pub fn mmcfg_off(&self) -> bool {
        self.commandline.split_ascii_whitespace().any(|word| {
            matches!(word.split_once('='), Some(("mmcfg", value)) if matches!(value.split(',').next(), Some("0" | "off" | "no" | "false" | "disable")))
                || word == "no-mmcfg"
        })
    }

    /// Whether devices can be passed through with an IOMMU.
    pub fn has_iommu(&self) -> bool {
        self.virt_caps.split_ascii_whitespace().any(|cap| cap == "pv_directio" || cap == "hvm_directio")
    }
}

/// Where facts about domains come from.
pub trait Domains {
    /// The guest with this name or number.
    ///
    /// # Errors
    /// There is none, or it cannot be asked for.
    fn guest(&self, name: &str) -> Outcome<Guest>;
    /// The driver domains that run.
    ///
    /// # Errors
    /// `xl list` does not answer.
    fn drivers(&self) -> Outcome<Vec<Driver>>;
    /// Both.
    ///
    /// # Errors
    /// As for each.
    fn guest_and_drivers(&self, name: &str) -> Outcome<(Guest, Vec<Driver>)> {
        Ok((self.guest(name)?, self.drivers()?))
    }
    /// Facts about the hypervisor.
    ///
    /// # Errors
    /// `xl info` does not answer.
    fn xen(&self) -> Outcome<XenInfo>;
}

/// The real one.
pub struct Xl;

fn xl(args: &[&str]) -> Outcome<String> {
    let output = Command::new("xl").args(args).output().map_err(|error| {
        Failure::new(format!("xl cannot be run: {error}"), "install Xen's tools and run as root in dom0")
    })?;
    if !output.status.success() {
        let told = String::from_utf8_lossy(&output.stderr);
        return Err(Failure::new(
            format!("xl {} failed: {}", args.join(" "), told.lines().last().unwrap_or("no message")),
            "see `xl list`",
        ));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

impl Domains for Xl {
    fn guest(&self, name: &str) -> Outcome<Guest> {
        let end = Instant::now() + CREATION;
        loop {
            let text = xl(&["list", "-l", "--", name]).map_err(|failure| {
                if failure.what.contains("cannot be run") {
                    return failure;
                }
                Failure::new(format!("there is no domain {name:?}"), "start the guest first; `xl list` shows what runs")
            })?;
            match parse_guest(&text) {
                Answer::Known(guest) => return Ok(guest),
                Answer::Starting if Instant::now() < end => sleep(Duration::from_millis(100)),
                Answer::Starting => {
                    return Err(Failure::new(
                        format!("domain {name:?} exists, but xl has no configuration of it"),
                        "wait until `xl create` is done; a domain that xl did not start cannot be used",
                    ));
                }
                Answer::Strange => {
                    return Err(Failure::new(
                        format!("xl list -l {name} has a form this tool does not know"),
                        "report the Xen release to the project",
                    ));
                }
            }
        }
    }

    fn drivers(&self) -> Outcome<Vec<Driver>> {
        parse_drivers(&xl(&["list", "-l"])?).ok_or_else(|| {
            Failure::new("xl list -l has a form this tool does not know", "report the Xen release to the project")
        })
    }

    /// xl is asked once, unless that does not find the guest: each start of it takes longer than the rest of an attachment.
    fn guest_and_drivers(&self, name: &str) -> Outcome<(Guest, Vec<Driver>)> {
        let text = xl(&["list", "-l"])?;
        match (find_guest(&text, name), parse_drivers(&text)) {
            (Some(guest), Some(drivers)) => Ok((guest, drivers)),
            _ => Ok((self.guest(name)?, self.drivers()?)),
        }
    }

    fn xen(&self) -> Outcome<XenInfo> {
        Ok(parse_info(&xl(&["info"])?))
    }
}

fn parse_info(text: &str) -> XenInfo {
    let value = |key: &str| {
        let lines = text.lines().filter_map(|line| line.split_once(':'));
        lines
            .into_iter()
            .find(|(name, _)| name.trim() == key)
            .map(|(_, value)| value.trim().to_string())
            .unwrap_or_default()
    };
    XenInfo { commandline: value("xen_commandline"), virt_caps: value("virt_caps") }
}

/// What `xl list -l NAME` says.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Known(Guest),
    /// Measured: while a domain is created, the answer is an empty array and exit code 0.
    Starting,
    Strange,
}

fn parse_guest(text: &str) -> Answer {
    let Ok(Value::Array(domains)) = serde_json::from_str(text) else { return Answer::Strange };
    let Some(domain) = domains.first() else { return Answer::Starting };
    guest_of(domain).map_or(Answer::Strange, Answer::Known)
}

/// The guest with this name or number in what `xl list -l` says of all.
fn find_guest(text: &str, name: &str) -> Option<Guest> {
    let Ok(Value::Array(domains)) = serde_json::from_str(text) else { return None };
    let number: Option<u32> = name.parse().ok();
    domains.iter().filter_map(guest_of).find(|guest| number.map_or(guest.name == name, |domid| guest.domid == domid))
}

fn domid_of(domain: &Value) -> Option<u32> {
    u32::try_from(domain.get("domid")?.as_u64()?).ok()
}

fn guest_of(domain: &Value) -> Option<Guest> {
    let create = domain.get("config")?.get("c_info")?;
    let build = domain.get("config")?.get("b_info")?;
    let pv = build.get("type.pv").or_else(|| build.get("u.pv"));
    let e820 = pv.and_then(|pv| pv.get("e820_host"));
    Some(Guest {
        domid: domid_of(domain)?,
        name: create.get("name")?.as_str()?.to_string(),
        kind: create.get("type")?.as_str()?.to_string(),
        // libxl writes a boolean that may be unset as a string.
        e820_host: e820.is_some_and(|value| value.as_str() == Some("True") || value.as_bool() == Some(true)),
        passthrough: create.get("passthrough").and_then(Value::as_str).unwrap_or("disabled").to_string(),
    })
}

/// PVH domains that were given frames and whose command line names functions.
fn parse_drivers(text: &str) -> Option<Vec<Driver>> {
    let Ok(Value::Array(domains)) = serde_json::from_str(text) else { return None };
    Some(domains.iter().filter_map(driver_of).collect())
}

fn driver_of(domain: &Value) -> Option<Driver> {
    let create = domain.get("config")?.get("c_info")?;
    let build = domain.get("config")?.get("b_info")?;
    let has_frames = build.get("iomem").and_then(Value::as_array).is_some_and(|frames| !frames.is_empty());
    if create.get("type")?.as_str()? != "pvh" || !has_frames {
        return None;
    }
    let (config, _) = cmdline::parse(build.get("cmdline")?.as_str()?);
    let name = create.get("name")?.as_str()?.to_string();
    (!config.devices.is_empty()).then_some(Driver { domid: domid_of(domain)?, name, config })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(text: &str) -> Guest {
        match parse_guest(text) {
            Answer::Known(guest) => guest,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_two_facts_of_a_pv_guest_are_found() {
        let found = guest(
            r#"[{"domid":3,"config":{"c_info":{"type":"pv","name":"db1","passthrough":"enabled"},
            "b_info":{"type.pv":{"e820_host":"True"}}}}]"#,
        );
        assert_eq!((found.domid, found.name.as_str(), found.e820_host), (3, "db1", true));
        assert_eq!(found.passthrough, "enabled");
        let found = guest(r#"[{"domid":3,"config":{"c_info":{"type":"pv","name":"a"},"b_info":{"type.pv":{}}}}]"#);
        assert_eq!((found.e820_host, found.passthrough.as_str()), (false, "disabled"));
    }

    #[test]
    fn a_guest_is_found_among_all_by_name_or_number() {
        let text = r#"[{"domid":0},{"domid":3,"config":{"c_info":{"type":"pv","name":"db1"},"b_info":{"type.pv":{}}}},
            {"domid":4,"config":{"c_info":{"type":"pv","name":"3x"},"b_info":{"type.pv":{}}}}]"#;
        for (name, domid) in
            [("db1", Some(3)), ("3", Some(3)), ("3x", Some(4)), ("4", Some(4)), ("5", None), ("", None)]
        {
            assert_eq!(find_guest(text, name).map(|guest| guest.domid), domid, "{name:?}");
        }
        assert_eq!(find_guest("nonsense", "db1"), None);
    }

    /// The rig's "reboot" on Xen 4.17: the new domain's name was there before its configuration.
    #[test]
    fn a_domain_that_is_being_created_is_told_from_an_unknown_form() {
        assert_eq!(parse_guest("[\n\n]\n\n"), Answer::Starting);
        assert_eq!(parse_guest("nonsense"), Answer::Strange);
        assert_eq!(parse_guest("[{}]"), Answer::Strange);
        assert_eq!(parse_guest("{}"), Answer::Strange);
    }

    #[test]
    fn only_a_configuration_makes_a_driver_domain() {
        let domain = |kind: &str, iomem: &str, cmdline: &str| {
            format!(
                r#"{{"domid":2,"config":{{"c_info":{{"type":"{kind}","name":"p0"}},"b_info":{{{iomem}"cmdline":"{cmdline}"}}}}}}"#
            )
        };
        let frames = r#""iomem":[{"start":721152,"number":1}],"#;
        let good = domain("pvh", frames, "ecam=0000:00-ff@b0000000 dev=0000:01:00.0,guest=db1");
        let others = [
            domain("pv", frames, "ecam=0000:00-ff@b0000000 dev=0000:01:00.0"),
            domain("pvh", "", "ecam=0000:00-ff@b0000000 dev=0000:01:00.0"),
            domain("pvh", frames, "root=/dev/xvda"),
            r#"{"domid":0}"#.to_string(),
        ];
        let found = parse_drivers(&format!("[{},{good}]", others.join(","))).unwrap();
        assert_eq!(found.len(), 1);
        let entry = found[0].entry("0000:01:00.0".parse().unwrap()).unwrap();
        assert_eq!(entry.guest.as_deref(), Some("db1"));
        assert_eq!(parse_drivers("nonsense"), None);
    }

    #[test]
    fn every_way_to_switch_mmcfg_off_is_seen() {
        for (line, off) in [
            ("console=com1 mmcfg=0", true),
            ("mmcfg=off,amd-fam10", true),
            ("mmcfg=no", true),
            ("no-mmcfg", true),
            ("mmcfg=1", false),
            ("mmcfg", false),
            ("xmmcfg=0", false),
            ("", false),
        ] {
            let info = XenInfo { commandline: line.into(), ..XenInfo::default() };
            assert_eq!(info.mmcfg_off(), off, "{line}");
        }
        let info = parse_info("virt_caps              : pv hvm pv_directio\nxen_commandline        : a b:c\n");
        assert!(info.has_iommu());
        assert_eq!(info.commandline, "a b:c");
    }
}

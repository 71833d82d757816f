//! `config`: the driver domain's xl file.

use std::fmt::Write;

use pciback::sbdf::Sbdf;
use pciback::topology;

use crate::error::{Failure, Outcome};
use crate::sysfs::{Ecam, Function, Sysfs};

/// What the file shall say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The driver domain's name.
    pub name: String,
    /// The image.
    pub kernel: String,
    /// The only guest that may have the functions.
    pub guest: Option<String>,
    /// Writes to registers without a rule pass.
    pub permissive: bool,
    /// `mode=`.
    pub mode: Choice,
    /// `topology=`.
    pub topology: topology::Kind,
}

/// The `mode=` of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The word.
    pub word: &'static str,
    /// Why, for a comment.
    pub why: &'static str,
}

/// The mode that fits this host, or the `wish` if it does. `mmcfg_off` says whether Xen was booted with mmcfg=0, where
/// that is known.
///
/// # Errors
/// The wish is no mode, or none for this Xen.
pub fn choose(wish: Option<&str>, mmcfg_off: Option<bool>) -> Outcome<Choice> {
    let (word, why) = match (wish, mmcfg_off) {
        (Some("read-only"), _) => ("read-only", "read-only, as --mode says: guests' configuration writes are refused"),
        (None | Some("mmcfg0"), Some(true)) => {
            ("mmcfg0", "Xen has mmcfg=0: mmcfg0, in which the domain writes configuration space itself")
        }
        (Some("mmcfg0"), None) => {
            ("mmcfg0", "mmcfg0, as --mode says: Xen must be booted with mmcfg=0 (xl info did not say whether it was)")
        }
        (None | Some("auto"), Some(false)) | (Some("auto"), Some(true)) => {
            ("auto", "auto: direct with the config-owner change, otherwise through xl-pciback serve")
        }
        (None | Some("auto"), None) => (
            "auto",
            "auto: direct with the config-owner change, otherwise through xl-pciback serve (xl info did not say \
             whether Xen has mmcfg=0)",
        ),
        (Some("mmcfg0"), Some(false)) => {
            return Err(Failure::new(
                "--mode mmcfg0: this Xen was not booted with mmcfg=0, so a configuration write would end the domain",
                "leave --mode out, or boot Xen with mmcfg=0 first",
            ));
        }
        (Some(other), _) => return Err(Failure::usage(format!("--mode {other} is not auto, mmcfg0 or read-only"))),
    };
    Ok(Choice { word, why })
}

/// The topology that `--topology` names.
///
/// # Errors
/// There is none of that name.
pub fn topology(wish: Option<&str>) -> Outcome<topology::Kind> {
    let wish = wish.unwrap_or(topology::Kind::default().word());
    let unknown = || Failure::usage(format!("--topology {wish} is not vpci or passthrough"));
    topology::Kind::parse(wish).ok_or_else(unknown)
}

/// The file for `functions`.
///
/// # Errors
/// A function that does not exist or that no ECAM window covers.
pub fn generate(sysfs: &Sysfs, functions: &[Sbdf], options: &Options) -> Outcome<String> {
    plain("--name", &options.name)?;
    plain("--kernel", &options.kernel)?;
    options.guest.as_deref().map_or(Ok(()), |guest| plain("--guest", guest))?;
    let windows = sysfs.ecam()?;
    let functions = functions.iter().map(|sbdf| sysfs.function(*sbdf)).collect::<Outcome<Vec<_>>>()?;
    render(&windows, &functions, options)
}

/// Text that stands in a quoted string of an xl file and in one word of a command line.
fn plain(option: &str, text: &str) -> Outcome<()> {
    let bad = |ch: char| ch.is_whitespace() || ch.is_control() || matches!(ch, '"' | '\'' | ',');
    if text.is_empty() || text.contains(bad) {
        return Err(Failure::usage(format!("{option} {text:?}: blanks, commas and quotes cannot stand there")));
    }
    Ok(())
}

fn render(windows: &[Ecam], functions: &[Function], options: &Options) -> Outcome<String> {
    let mut frames = Vec::new();
    let mut words: Vec<String> = Vec::new();
    let mut comments = String::new();
    for function in functions {
        let sbdf = function.sbdf;
        if let Some(refusal) = function.refusal() {
            return Err(refusal);
        }
        let window = windows.iter().find(|window| window.frame(sbdf).is_some());
        let (Some(window), Some(frame)) = (window, window.and_then(|window| window.frame(sbdf))) else {
            return Err(Failure::new(
                format!("{sbdf}: no window of ACPI's MCFG table covers its bus"),
                "this function cannot be served; see dmesg | grep -i mcfg",
            ));
        };
        let entry = format!("\"{frame:x},1\"");
        if frames.contains(&entry) {
            return Err(Failure::usage(format!("{sbdf} is named twice")));
        }
        frames.push(entry);
        if !words.contains(&window.word()) {
            words.insert(0, window.word());
        }
        let mut word = format!("dev={sbdf}");
        if let Some(guest) = &options.guest {
            let _ = write!(word, ",guest={guest}");
        }
        let _ = write!(word, ",id={}", function.id_text());
        if options.permissive {
            word.push_str(",permissive");
        }
        words.push(word);
        let irq = match function.irq {
            irq @ 1..255 if function.is_assignable() => format!("GSI {irq}"),
            _ => "interrupt not routed yet (xl-pciback assignable-add)".to_string(),
        };
        let _ = writeln!(comments, "# {sbdf}: {}, {irq}, configuration space at frame {frame:x}", function.id_text());
    }
    words.push(format!("mode={}", options.mode.word));
    if options.topology != topology::Kind::default() {
        words.push(format!("topology={}", options.topology.word()));
    }
    Ok(format!(
        "# Driver domain for PCI functions, written by xl-pciback config.\n{comments}# {}\n\
         name = \"{}\"\ntype = \"pvh\"\nkernel = \"{}\"\nmemory = 4\nmaxmem = 4\nvcpus = 1\n\
         # It takes the time by Xen's clock, which fits each processor: emulating the counter would only cost.\n\
         tsc_mode = \"native\"\n\
         iomem = [ {} ]\nextra = \"{}\"\n",
        options.mode.why,
        options.name,
        options.kernel,
        frames.join(", "),
        words.join(" ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_has_frames_ids_and_the_window_once() {
        let windows = [Ecam { base: 0xb000_0000, segment: 0, first_bus: 0, last_bus: 255 }];
        let function = |text: &str, id| Function {
            sbdf: text.parse().unwrap(),
            id,
            class: 0x02_0000,
            header_type: 0,
            is_virtual: false,
            resources: Default::default(),
            irq: 21,
            driver: None,
            driver_override: Some(crate::sysfs::NOBODY.into()),
        };
        let functions = [function("0000:01:00.0", (0x1b36, 0x10)), function("0000:00:05.0", (0x8086, 0x10d3))];
        let options = Options {
            name: "pciback0".into(),
            kernel: "/k".into(),
            guest: Some("db1".into()),
            permissive: false,
            mode: choose(None, Some(true)).unwrap(),
            topology: topology(None).unwrap(),
        };
        let file = render(&windows, &functions, &options).unwrap();
        assert!(file.contains("iomem = [ \"b0100,1\", \"b0028,1\" ]\n"), "{file}");
        let extra = "extra = \"ecam=0000:00-ff@b0000000 dev=0000:01:00.0,guest=db1,id=1b36:0010 \
                     dev=0000:00:05.0,guest=db1,id=8086:10d3 mode=mmcfg0\"\n";
        assert!(file.contains(extra), "{file}");
        assert!(file.contains("# 0000:01:00.0: 1b36:0010, GSI 21, configuration space at frame b0100\n"), "{file}");
        assert!(file.contains("\n# Xen has mmcfg=0: "), "{file}");
        // What is printed is what the driver domain understands.
        let line = extra.trim_start_matches("extra = \"").trim_end_matches("\"\n");
        assert_eq!(pciback::cmdline::parse(line).1, []);
        let hosts = Options { topology: topology(Some("passthrough")).unwrap(), ..options.clone() };
        let file = render(&windows, &functions, &hosts).unwrap();
        assert!(file.contains(" mode=mmcfg0 topology=passthrough\"\n"), "{file}");
        let beyond = [function("0001:01:00.0", (1, 1))];
        assert!(render(&windows, &beyond, &options).unwrap_err().what.contains("no window"));
        let twice = [functions[0].clone(), functions[0].clone()];
        assert!(render(&windows, &twice, &options).unwrap_err().what.contains("named twice"));
    }

    #[test]
    fn the_mode_is_one_that_works_on_this_xen_and_says_why() {
        for (wish, mmcfg_off, word, why) in [
            (None, Some(true), "mmcfg0", "Xen has mmcfg=0"),
            (None, Some(false), "auto", "otherwise through xl-pciback serve"),
            (None, None, "auto", "xl info did not say"),
            (Some("mmcfg0"), Some(true), "mmcfg0", "Xen has mmcfg=0"),
            (Some("mmcfg0"), None, "mmcfg0", "must be booted with mmcfg=0"),
            (Some("auto"), Some(true), "auto", "otherwise through xl-pciback serve"),
            (Some("auto"), Some(false), "auto", "direct with the config-owner change"),
            (Some("auto"), None, "auto", "xl info did not say"),
            (Some("read-only"), Some(true), "read-only", "are refused"),
            (Some("read-only"), Some(false), "read-only", "are refused"),
            (Some("read-only"), None, "read-only", "are refused"),
        ] {
            let choice = choose(wish, mmcfg_off).unwrap();
            assert!(choice.word == word && choice.why.contains(why), "{wish:?} {mmcfg_off:?}: {choice:?}");
            // The rig's scenarios change the file's words, and must not find them here.
            assert!(!choice.why.contains("mode="), "{choice:?}");
        }
        assert!(choose(Some("mmcfg0"), Some(false)).unwrap_err().what.contains("would end the domain"));
        for wish in ["", "direct", "delegated", "MMCFG0", "auto "] {
            assert_eq!(choose(Some(wish), None).unwrap_err().code, crate::error::exit::USAGE, "{wish:?}");
        }
    }

    #[test]
    fn a_topology_is_one_of_two_words() {
        for (wish, kind) in [(None, "vpci"), (Some("vpci"), "vpci"), (Some("passthrough"), "passthrough")] {
            assert_eq!(topology(wish).unwrap().word(), kind);
        }
        for wish in ["", "host", "passthrough slot=1"] {
            assert_eq!(topology(Some(wish)).unwrap_err().code, crate::error::exit::USAGE, "{wish:?}");
        }
    }

    #[test]
    fn a_name_cannot_carry_words_of_its_own_into_the_file() {
        for text in ["", "db1,permissive", "db1 mode=mmcfg0", "db1\"\nkernel=\"/x", "db'1"] {
            assert!(plain("--guest", text).is_err(), "{text:?}");
        }
        assert_eq!(plain("--guest", "sys-net.2_b"), Ok(()));
    }
}

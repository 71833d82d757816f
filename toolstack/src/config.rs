//! `config`: the driver domain's xl file.

use std::fmt::Write;

use pciback::sbdf::Sbdf;

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
    pub mode: String,
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
    words.push(format!("mode={}", options.mode));
    let mode = match options.mode.as_str() {
        "mmcfg0" => "this Xen was booted with mmcfg=0, so the domain may write configuration space",
        "read-only" => "guests' configuration writes are refused",
        _ => "full function on a Xen with the config-owner change, else read-only (xl-pciback status tells which)",
    };
    Ok(format!(
        "# Driver domain for PCI functions, written by xl-pciback config.\n{comments}# mode={}: {mode}\n\
         name = \"{}\"\ntype = \"pvh\"\nkernel = \"{}\"\nmemory = 4\nmaxmem = 4\nvcpus = 1\n\
         iomem = [ {} ]\nextra = \"{}\"\n",
        options.mode,
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
            mode: "mmcfg0".into(),
        };
        let file = render(&windows, &functions, &options).unwrap();
        assert!(file.contains("iomem = [ \"b0100,1\", \"b0028,1\" ]\n"), "{file}");
        let extra = "extra = \"ecam=0000:00-ff@b0000000 dev=0000:01:00.0,guest=db1,id=1b36:0010 \
                     dev=0000:00:05.0,guest=db1,id=8086:10d3 mode=mmcfg0\"\n";
        assert!(file.contains(extra), "{file}");
        assert!(file.contains("# 0000:01:00.0: 1b36:0010, GSI 21, configuration space at frame b0100\n"), "{file}");
        // What is printed is what the driver domain understands.
        let line = extra.trim_start_matches("extra = \"").trim_end_matches("\"\n");
        assert_eq!(pciback::cmdline::parse(line).1, []);
        let beyond = [function("0001:01:00.0", (1, 1))];
        assert!(render(&windows, &beyond, &options).unwrap_err().what.contains("no window"));
        let twice = [functions[0].clone(), functions[0].clone()];
        assert!(render(&windows, &twice, &options).unwrap_err().what.contains("named twice"));
    }

    #[test]
    fn a_name_cannot_carry_words_of_its_own_into_the_file() {
        for text in ["", "db1,permissive", "db1 mode=mmcfg0", "db1\"\nkernel=\"/x", "db'1"] {
            assert!(plain("--guest", text).is_err(), "{text:?}");
        }
        assert_eq!(plain("--guest", "sys-net.2_b"), Ok(()));
    }
}

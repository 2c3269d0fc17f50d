//! Commits per second against writers, as vector graphics. Text is left to whoever shows it: no font is embedded.

use std::path::Path;

use plotters::coord::combinators::IntoLogRange;
use plotters::prelude::*;

use crate::peer::Failure;
use crate::work::commit::Measured;
use crate::work::sides::Kind;

const SIZE: (u32, u32) = (860, 520);

/// A line: its name, colour, and whose figures it shows. Where these are several the best at each number of writers is drawn.
type Line = (&'static str, RGBColor, fn(Kind) -> bool);

const LINES: [Line; 6] = [
    ("onewrite", RGBColor(200, 30, 30), |kind| kind == Kind::Keyless),
    ("onewrite, 1,000 keys", RGBColor(230, 140, 60), |kind| kind == Kind::Keyed),
    ("onewrite, behind a journal", RGBColor(150, 30, 120), |kind| kind == Kind::Journaled),
    ("redb by hand", RGBColor(120, 60, 160), |kind| kind == Kind::Redb),
    ("SQLite", RGBColor(30, 90, 180), Kind::is_sqlite),
    ("fjall", RGBColor(40, 140, 80), Kind::is_fjall),
];

fn points(measured: &[Measured], of: fn(Kind) -> bool) -> Vec<(f64, f64)> {
    let mut points: Vec<(f64, f64)> = Vec::new();
    for one in measured.iter().filter(|one| of(one.kind)) {
        let writers = one.writers as f64;
        match points.iter_mut().find(|point| point.0 == writers) {
            Some(point) => point.1 = point.1.max(one.rate),
            None => points.push((writers, one.rate)),
        }
    }
    points
}

/// Writes the picture.
pub(crate) fn commits(path: &Path, measured: &[Measured]) -> Result<(), Failure> {
    let rates = measured.iter().filter(|one| LINES.iter().any(|line| line.2(one.kind))).map(|one| one.rate);
    let (low, high) = rates.fold((f64::MAX, 0.0_f64), |(low, high), rate| (low.min(rate), high.max(rate)));
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let (chart_area, caption) = area.split_vertically(SIZE.1 - 30);
    let font = |size: u32| ("sans-serif", size).into_font();
    let mut chart = ChartBuilder::on(&chart_area)
        .caption("Durable commits: a 100-byte row and a 256-byte event each", font(22))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(72)
        .build_cartesian_2d((0.9..72.0).log_scale().base(4.0), (low * 0.7..high * 1.4).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("writers")
        .y_desc("commits per second")
        .x_label_formatter(&|writers| format!("{writers:.0}"))
        .y_label_formatter(&|rate| thousands(*rate))
        .axis_desc_style(font(17))
        .label_style(font(15))
        .light_line_style(RGBColor(235, 235, 235))
        .draw()?;
    for (name, color, of) in LINES {
        let points = points(measured, of);
        chart
            .draw_series(LineSeries::new(points.clone(), color.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2)));
        chart.draw_series(points.into_iter().map(|point| Circle::new(point, 4, color.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .label_font(font(16))
        .background_style(WHITE.mix(0.85))
        .border_style(RGBColor(200, 200, 200))
        .draw()?;
    caption.draw(&Text::new(caption_text(), (16, 2), font(15)))?;
    area.present()?;
    Ok(())
}

fn thousands(rate: f64) -> String {
    let text = format!("{rate:.0}");
    match text.len() {
        length @ 4.. => format!("{},{}", &text[..length - 3], &text[length - 3..]),
        _ => text,
    }
}

fn caption_text() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!("{}, {}, {cores} cores; each peer at its best settings; one disk", today(), processor())
}

/// As the kernel names it.
fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    model.map_or_else(|| "unknown processor".into(), |(_, name)| name.trim().into())
}

/// The date in UTC, as year-month-day.
fn today() -> String {
    let now = humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string();
    now.split('T').next().unwrap_or_default().to_owned()
}

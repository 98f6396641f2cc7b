// SPDX-License-Identifier: BSD-3-Clause
//! Plots: a ratio for each cell, with its interval, on a logarithmic axis around 1.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::stats::Estimate;

/// Pixels for each cell.
const LINE: u32 = 18;
const WIDTH: u32 = 900;

/// Draws the ratios of some cells into an SVG file.
pub fn ratios(path: &Path, title: &str, rows: &[(String, Estimate)]) -> Result<()> {
    draw(path, title, rows).map_err(|error| anyhow!("{}: {error}", path.display()))
}

fn draw(
    path: &Path,
    title: &str,
    rows: &[(String, Estimate)],
) -> Result<(), Box<dyn std::error::Error>> {
    let count = rows.len() as i32;
    let least = rows.iter().map(|(_, ratio)| ratio.low).fold(0.9, f64::min);
    let most = rows.iter().map(|(_, ratio)| ratio.high).fold(1.1, f64::max);
    // A ratio of 0 has no place on a logarithmic axis.
    let (least, most) = ((least * 0.95).max(0.01), most * 1.05);
    let root = SVGBackend::new(path, (WIDTH, 90 + LINE * rows.len() as u32)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 18))
        .margin(10)
        .x_label_area_size(30)
        .y_label_area_size(190)
        .build_cartesian_2d((least..most).log_scale(), -1..count)?;
    // The first cell stands at the top.
    let name = |place: &i32| {
        let row = usize::try_from(count - 1 - place).ok().and_then(|at| rows.get(at));
        row.map_or(String::new(), |(name, _)| name.clone())
    };
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(rows.len() + 2)
        .y_label_formatter(&name)
        .x_label_formatter(&|ratio| format!("{ratio:.2}"))
        .label_style(("sans-serif", 12))
        .draw()?;
    chart.draw_series([
        PathElement::new([(1.0, -1), (1.0, count)], BLACK.stroke_width(1)),
        PathElement::new([(0.95, -1), (0.95, count)], RED.mix(0.4).stroke_width(1)),
    ])?;
    for (at, (_, ratio)) in rows.iter().enumerate() {
        let y = count - 1 - at as i32;
        let color = match (ratio.low > 1.0, ratio.high < 1.0) {
            (true, _) => RGBColor(0, 120, 60),
            (_, true) => RGBColor(190, 40, 40),
            _ => RGBColor(90, 90, 90),
        };
        let span = [(ratio.low.max(least), y), (ratio.high, y)];
        chart.draw_series([PathElement::new(span, color.stroke_width(2))])?;
        chart.draw_series([Circle::new((ratio.median, y), 4, color.filled())])?;
    }
    root.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cell_is_named_and_has_a_point() {
        let path = std::env::temp_dir().join(format!("bench-plot.{}.svg", std::process::id()));
        let row = |name: &str, median| {
            let (low, high) = (median * 0.9, median * 1.1);
            (name.to_owned(), Estimate { median, low, high, level: 0.97 })
        };
        ratios(&path, "title", &[row("first", 1.5), row("second", 0.5)]).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(text.contains("first") && text.contains("second") && text.contains("title"));
        assert_eq!(text.matches("<circle").count(), 2);
    }
}

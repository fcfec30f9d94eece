// Draws a dashboard with the components that Grafana itself draws it with.
//
// window.DASHBOARD is the dashboard's JSON, window.ANSWERS what Prometheus answered: for each panel's title the
// answers of its targets, each a list of {name, labels, step: seconds, values: [[seconds, value], …]}; window.RANGE
// the time that was asked about, in seconds.
import './node_modules/uplot/dist/uPlot.min.css';
import React from 'react';
import { createRoot } from 'react-dom/client';
import {
  applyFieldOverrides,
  createTheme,
  FieldConfigOptionsRegistry,
  FieldType,
  identityOverrideProcessor,
  ThemeContext,
  toDataFrame,
} from '@grafana/data';
import {
  BarGauge,
  BigValue,
  BigValueColorMode,
  BigValueGraphMode,
  BigValueJustifyMode,
  BigValueTextMode,
  GlobalStyles,
  PanelChrome,
  Table,
  TimeSeries,
} from '@grafana/ui';
import { BarGaugeDisplayMode, BarGaugeNamePlacement, VizOrientation } from '@grafana/schema';

const theme = createTheme({ colors: { mode: 'dark' } });
const CELL_WIDTH = 62;
const CELL_HEIGHT = 38;

// What overrides may set. In Grafana each panel plugin brings this list along.
const registry = new FieldConfigOptionsRegistry();
const OWN = ['color', 'unit', 'displayName', 'mappings', 'links', 'thresholds', 'decimals', 'min', 'max', 'noValue'];
const CUSTOM = [
  'axisSoftMax', 'cellOptions', 'fillBelowTo', 'fillOpacity', 'inspect', 'lineStyle', 'lineWidth', 'minWidth',
  'showPoints', 'stacking', 'width',
];
OWN.forEach((id) => register(id, id, false));
CUSTOM.forEach((id) => register(`custom.${id}`, id, true));

function register(id, path, isCustom) {
  registry.register({
    id, path, isCustom, name: id, process: identityOverrideProcessor, shouldApply: () => true, editor: () => null,
    override: () => null, settings: {},
  });
}

function dressed(panel, frames) {
  return applyFieldOverrides({
    data: frames,
    fieldConfig: { defaults: panel.fieldConfig?.defaults ?? {}, overrides: panel.fieldConfig?.overrides ?? [] },
    fieldConfigRegistry: registry,
    replaceVariables: (text) => text,
    theme,
    timeZone: 'utc',
  });
}

function series(answer) {
  const values = answer.step ? withGaps(answer.values, answer.step) : answer.values;
  return toDataFrame({
    name: answer.name,
    fields: [
      { name: 'Time', type: FieldType.time, values: values.map((value) => value[0] * 1000) },
      {
        name: 'Value',
        type: FieldType.number,
        labels: answer.labels,
        config: { displayNameFromDS: answer.name },
        values: values.map((value) => (value[1] === null ? null : Number(value[1]))),
      },
    ],
  });
}

// Nothing where a step is missing, or a line would be drawn to where there is a value again.
function withGaps(values, step) {
  return values.flatMap((value, index) => {
    const before = index ? values[index - 1][0] : value[0];
    return value[0] - before > step ? [[before + step, null], value] : [value];
  });
}

function Lines({ panel, answers, width, height }) {
  const frames = dressed(panel, answers.flat().map(series));
  frames.forEach((frame, index) =>
    frame.fields.forEach((field) => {
      field.state = { ...field.state, seriesIndex: index };
      field.config.color = field.config.color ?? { mode: 'palette-classic' };
      field.config.custom = { drawStyle: 'line', axisPlacement: 'auto', ...field.config.custom };
    })
  );
  const [from, to] = window.RANGE.map((seconds) => ({ valueOf: () => seconds * 1000 }));
  const range = { from, to, raw: { from: 'now-1h', to: 'now' } };
  return (
    <TimeSeries
      frames={frames}
      width={width}
      height={height}
      timeRange={range}
      timeZone="utc"
      theme={theme}
      legend={panel.options.legend}
    />
  );
}

function Number_({ panel, answers, width, height }) {
  const [frame] = dressed(panel, answers.flat().slice(0, 1).map(series));
  const field = frame.fields[1];
  return (
    <BigValue
      theme={theme}
      width={width}
      height={height}
      value={field.display(field.values[field.values.length - 1])}
      colorMode={BigValueColorMode.Value}
      graphMode={BigValueGraphMode.None}
      justifyMode={BigValueJustifyMode.Auto}
      textMode={BigValueTextMode.Value}
    />
  );
}

function Bars({ panel, answers, width, height }) {
  const frames = dressed(panel, answers.flat().map(series));
  const each = height / frames.length;
  return (
    <div>
      {frames.map((frame, index) => {
        const field = frame.fields[1];
        const value = field.display(field.values.at(-1));
        const colour = field.config.color?.fixedColor;
        return (
          <BarGauge
            key={index}
            theme={theme}
            width={width}
            height={each - 4}
            orientation={VizOrientation.Horizontal}
            displayMode={BarGaugeDisplayMode.Basic}
            namePlacement={BarGaugeNamePlacement.Top}
            field={{ ...field.config, ...field.state.range }}
            value={{ ...value, title: frame.name, color: colour ? theme.visualization.getColorByName(colour) : value.color }}
            display={field.display}
            text={panel.options.text}
          />
        );
      })}
    </div>
  );
}

// Rows with the same labels are one, as Grafana's "merge" and "organize" do.
function Listing({ panel, answers, width, height }) {
  const organized = panel.transformations.find((each) => each.id === 'organize').options.indexByName;
  const labels = Object.keys(organized).sort((one, other) => organized[one] - organized[other]);
  const rows = new Map();
  answers.forEach((answer, target) =>
    answer.forEach((one) => {
      const key = labels.map((label) => one.labels[label] ?? '').join('\0');
      const row = rows.get(key) ?? { labels: one.labels, values: [] };
      row.values[target] = Number(one.values.at(-1)[1]);
      rows.set(key, row);
    })
  );
  const all = [...rows.values()];
  const frame = toDataFrame({
    fields: [
      ...labels.map((label) => ({ name: label, type: FieldType.string, values: all.map((row) => row.labels[label] ?? '') })),
      ...panel.targets.map((target, index) => ({
        name: `Value #${target.refId}`,
        type: FieldType.number,
        values: all.map((row) => row.values[index] ?? null),
      })),
    ],
  });
  const [shown] = dressed(panel, [frame]);
  return <Table data={shown} width={width} height={height} />;
}

const DRAWN = { timeseries: Lines, stat: Number_, bargauge: Bars, table: Listing };

// Grafana draws these in its application and not in a library.
function Undrawn({ panel, answers }) {
  const texts = panel.fieldConfig.defaults.mappings?.[0]?.options ?? {};
  const names = answers.flat().map(({ name, values }) => {
    const text = texts[values.at(-1)[1]]?.text;
    return text ? `${name}: ${text}` : name;
  });
  return (
    <div style={{ padding: 12, color: theme.colors.text.secondary }}>
      <p>Only Grafana itself draws a panel of the type “{panel.type}”. It would show:</p>
      <pre style={{ fontSize: 11 }}>{names.slice(0, 12).join('\n')}</pre>
    </div>
  );
}

class Guard extends React.Component {
  constructor(properties) {
    super(properties);
    this.state = {};
  }

  static getDerivedStateFromError(error) {
    window.FAILED = [...(window.FAILED ?? []), String(error.stack)];
    return { error };
  }

  render() {
    return this.state.error ? <pre style={{ color: 'red' }}>{String(this.state.error.stack)}</pre> : this.props.children;
  }
}

function Row({ row }) {
  const outer = { position: 'absolute', left: 12, top: row.gridPos.y * CELL_HEIGHT + 6, color: theme.colors.text.primary };
  return <div style={{ ...outer, fontSize: 16 }}>{row.title}</div>;
}

function Panel({ panel }) {
  const place = panel.gridPos;
  const answers = window.ANSWERS[panel.title] ?? [];
  const Drawn = DRAWN[panel.type] ?? Undrawn;
  const outer = { position: 'absolute', left: place.x * CELL_WIDTH, top: place.y * CELL_HEIGHT };
  return (
    <div style={outer}>
      <PanelChrome title={panel.title} width={place.w * CELL_WIDTH - 8} height={place.h * CELL_HEIGHT - 8}>
        {(width, height) =>
          answers.flat().length ? (
            <Guard>
              <Drawn panel={panel} answers={answers} width={width} height={height} />
            </Guard>
          ) : (
            <div style={{ padding: 12, fontSize: panel.type === 'stat' ? 32 : 14 }}>
              {panel.fieldConfig.defaults.noValue ?? 'No data'}
            </div>
          )
        }
      </PanelChrome>
    </div>
  );
}

document.body.style.background = theme.colors.background.canvas;
const rows = window.DASHBOARD.panels.filter((panel) => panel.type === 'row');
const panels = window.DASHBOARD.panels.flatMap((panel) => (panel.type === 'row' ? panel.panels ?? [] : [panel]));
createRoot(document.getElementById('root')).render(
  <ThemeContext.Provider value={theme}>
    <GlobalStyles />
    <h2 style={{ color: theme.colors.text.primary, padding: '8px 12px' }}>{window.DASHBOARD.title}</h2>
    <div style={{ position: 'relative' }}>
      {rows.map((row) => (
        <Row key={row.title} row={row} />
      ))}
      {panels.map((panel) => (
        <Panel key={panel.title} panel={panel} />
      ))}
    </div>
  </ThemeContext.Provider>
);

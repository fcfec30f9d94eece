// What a dashboard is, by the types of Grafana itself; look.py makes a JSON Schema of it.
import type { Dashboard } from '@grafana/schema';
export type Checked = Dashboard;

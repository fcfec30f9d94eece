// The default export of a CommonJS package, as Grafana's own bundler hands it to its components.
import all from './node_modules/react-custom-scrollbars-2/lib/index.js';

export const Scrollbars = all.Scrollbars;
export default all.Scrollbars;

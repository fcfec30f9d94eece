pytest_plugins = ["boardbench.testkit"]

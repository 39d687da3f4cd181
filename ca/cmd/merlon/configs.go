// Which CA a command works on that speaks to none: by its configuration files or its
// data_dir.

package main

import (
	"os"

	"github.com/spf13/cobra"

	"merlon.dev/ca"
	"merlon.dev/ca/internal/config"
)

// storeFlags say which CA a command works on.
type storeFlags struct{ config, dataDir string }

func (f *storeFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.config, "config", "", "the configuration file of a CA that is stopped")
	cmd.Flags().StringVar(&f.dataDir, "data-dir", "", "the data_dir of a CA that is stopped, for its Badger store")
}

func (f *storeFlags) given() bool { return f.config != "" || f.dataDir != "" }

func (f *storeFlags) read() (ca.Config, error) {
	if f.config != "" && f.dataDir != "" {
		return ca.Config{}, usageError{"--config and --data-dir each name a CA", "give one of them"}
	}
	if f.dataDir != "" {
		if err := checkFolder(f.dataDir, "name the folder that merlon-ca has as its data_dir: --data-dir /var/lib/merlon/ca"); err != nil {
			return ca.Config{}, err
		}
	}
	return readStoreConfig(f.config, f.dataDir)
}

func readStoreConfig(file, dataDir string) (ca.Config, error) {
	cfg, err := config.ForStore(file, dataDir, os.Getenv)
	if err != nil {
		return cfg, usageError{err.Error(), "name the file that merlon-ca is started with, such as /etc/merlon/ca.yaml"}
	}
	return cfg, nil
}

// move names two configurations: the one that is in use, and the one that will be.
type move struct{ from, to string }

func (m *move) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&m.from, "from", "", "the configuration file that is in use")
	cmd.Flags().StringVar(&m.to, "to", "", "the configuration file that will be")
}

// read reads both; example is the command as it should be.
func (m *move) read(example string) (from, to ca.Config, err error) {
	if m.from == "" || m.to == "" {
		return from, to, usageError{"say from which configuration to which, with --from and --to", example}
	}
	if from, err = readStoreConfig(m.from, ""); err != nil {
		return from, to, err
	}
	to, err = readStoreConfig(m.to, "")
	return from, to, err
}

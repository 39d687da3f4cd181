// merlon key: under what the CA's private keys are sealed.

package main

import (
	"errors"
	"io/fs"
	"strconv"

	"github.com/spf13/cobra"

	"merlon.dev/ca"
	"merlon.dev/ca/internal/offline"
)

func keyCommand(o *options) *cobra.Command {
	return noun("key", "The CA's private keys: seal them under another key-encryption key", keyReseal(o))
}

// resealedJSON is `merlon key reseal -o json`.
type resealedJSON struct {
	Keys    string `json:"keys"`
	Sealed  int    `json:"sealed"`
	Already int    `json:"already"`
}

func keyReseal(o *options) *cobra.Command {
	var m move
	cmd := &cobra.Command{
		Use:   "reseal --from FILE --to FILE",
		Short: "Seal the CA's private keys under another key-encryption key",
		Long: `Seal every private key in data_dir/keys, which is under the key-encryption key
of one configuration of merlon-ca (key_file, key_credential, key_passphrase_file
or data_dir/kek), under that of another. The CA is stopped meanwhile. After an
interruption run the same command again: no key is ever lost, as long as both
key-encryption keys are there.`,
		Example: "  openssl rand -hex 32 > /etc/merlon/kek2 && chmod 600 /etc/merlon/kek2\n" +
			"  merlon key reseal --from /etc/merlon/ca.yaml --to /etc/merlon/ca-new.yaml   # with key_file: /etc/merlon/kek2",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			source, target, err := m.read("merlon key reseal --from /etc/merlon/ca.yaml --to /etc/merlon/ca-new.yaml")
			if err != nil {
				return err
			}
			done, err := offline.ResealKeys(cmd.Context(), source, target)
			if e, ok := errors.AsType[*offline.MismatchError](err); ok {
				return usageError{e.Error(), e.Hint}
			}
			if errors.Is(err, fs.ErrNotExist) {
				return hintError{err, "name with --from the configuration that merlon-ca is started with: there are no keys yet where this one says"}
			}
			if err != nil {
				return hintError{err, ca.Hint(err)}
			}
			if o.output == "json" {
				return printJSON(cmd.OutOrStdout(), resealedJSON{done.Dir, done.Sealed, done.Already})
			}
			return printFields(cmd.OutOrStdout(), "keys", done.Dir, "sealed", strconv.Itoa(done.Sealed), "already", strconv.Itoa(done.Already))
		},
	}
	m.register(cmd)
	return cmd
}

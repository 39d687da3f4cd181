// Command stepca runs step-ca for tests: the server of smallstep's certificates
// module with its configuration file, in a Go module of its own so that Merlon does
// not depend on a server. It ends when its standard input does, so that none
// outlives the test that started it.
package main

import (
	"fmt"
	"io"
	"os"

	"github.com/smallstep/certificates/authority/config"
	"github.com/smallstep/certificates/ca"
)

func main() {
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "stepca:", err)
		os.Exit(1)
	}
}

func run(file string) error {
	cfg, err := config.LoadConfiguration(file)
	if err != nil {
		return err
	}
	server, err := ca.New(cfg, ca.WithConfigFile(file))
	if err != nil {
		return err
	}
	return server.Run()
}

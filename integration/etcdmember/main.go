// Command etcdmember runs one member of etcd for tests: stock etcd with all
// its flags, built from its Go module, in a module of its own so that Merlon
// does not depend on a server. It ends when its standard input does, so that
// none outlives the test that started it.
package main

import (
	"io"
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() {
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	etcdmain.Main(os.Args)
}

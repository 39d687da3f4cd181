// Command svidfiles keeps an X509-SVID in files, for a server that reads files: the
// chain, its key and the trust bundle as PEM. After each change it runs a command
// that has the server read them again.
package main

import (
	"context"
	"encoding/pem"
	"flag"
	"log"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"merlon.dev/sdk"
)

func main() {
	dir := flag.String("dir", ".", "folder for svid.pem, key.pem and bundle.pem")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	id, err := sdk.Open(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer id.Close()
	for last := ""; ; {
		now, err := write(id, *dir, last)
		if err == nil && last != "" && now != last && flag.NArg() > 0 {
			err = exec.CommandContext(ctx, flag.Arg(0), flag.Args()[1:]...).Run()
		}
		if last = now; err != nil {
			log.Print(err) // a server that is away reads the files when it starts
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return
		}
	}
}

// write puts what is current into the files, unless that is last.
func write(id *sdk.Identity, dir, last string) (string, error) {
	own, err := id.GetX509SVID()
	if err != nil {
		return last, err
	}
	chain, key, err := own.Marshal()
	if err != nil {
		return last, err
	}
	bundle, err := id.GetX509BundleForTrustDomain(own.ID.TrustDomain())
	if err != nil {
		return last, err
	}
	var roots []byte
	for _, c := range bundle.X509Authorities() {
		roots = append(roots, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	now := string(chain) + string(roots)
	if now == last {
		return last, nil
	}
	for name, text := range map[string][]byte{"svid.pem": chain, "key.pem": key, "bundle.pem": roots} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path+".new", text, 0o600); err != nil {
			return last, err
		}
		if err := os.Rename(path+".new", path); err != nil { // never half a file
			return last, err
		}
	}
	return now, nil
}
